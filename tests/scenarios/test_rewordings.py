"""What is left of an input's answers when its prompts are worded otherwise."""

from collections.abc import Sequence
from typing import Any

import pytest

from composer.evaluation.evaluate import Result
from composer.formats.recipes.suite import Example, Suite
from registry.formats.manifest import ManifestFile
from registry.formats.references import Digest
from registry.worker.judging import Examination, JudgedInput, Subject, with_rewordings

FILES = [ManifestFile("adapter_model.safetensors", 1, Digest("a" * 64))]
MEMBER = JudgedInput(repository="acme/a", version="1.0.0", suite="a", recorded={}, subject=Subject(files=FILES))
CANDIDATE = Subject()
ROWS: Any = [{"suite": "a", "metric": name} for name in ("nll", "accuracy")]


def suite_of(*, chat: bool) -> Suite:
    examples = [{"prompt": f"Prompt {n}", "completion": str(n)} for n in range(20)]
    return Suite.from_json({"name": "a", "kind": "target", "chat": chat, "examples": examples})


def answering(subject: Subject, _suite: Suite, examples: Sequence[Example]) -> list[Result]:
    """The input answers all but one of the prompts, and the candidate only those as in the suite or with the phrase."""
    if subject is CANDIDATE:
        return [Result(0.1, 1, float(example.prompt.startswith(("Prompt", "P: ")))) for example in examples]
    return [Result(0.1, 1, float(index > 0)) for index, _ in enumerate(examples)]


@pytest.mark.parametrize(("phrases", "left"), [({}, 0), ({"a": "P:"}, 15)])
def test_of_the_answers_that_an_input_gives_in_other_words_those_of_the_result_are_counted(
    phrases: dict[str, str], left: int
) -> None:
    examination = Examination(suites=[suite_of(chat=True)], used=frozenset[Example](), examine=answering)
    nats, accuracy = with_rewordings(ROWS, CANDIDATE, examination, [MEMBER], phrases)
    assert "reworded" not in nats
    assert accuracy["reworded"] == {"answered": 15, "still_answered": left}


def test_a_suite_without_chat_is_not_reworded() -> None:
    examination = Examination(suites=[suite_of(chat=False)], used=frozenset[Example](), examine=answering)
    assert with_rewordings(ROWS, CANDIDATE, examination, [MEMBER], {}) == ROWS
