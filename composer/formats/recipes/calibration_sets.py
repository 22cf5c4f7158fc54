"""The examples that a method is fitted on, by digest: a lock names them, and they are not used to judge."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass

from composer.formats.recipes.suite import Example, Suite


@dataclass(frozen=True, slots=True)
class CalibrationSet:
    """The examples that one adapter is fitted on: the first `count` examples of a suite's fixed random order, or
    prompts without answers."""

    suite: Suite | None = None
    count: int = 0
    prompts: tuple[str, ...] = ()

    @property
    def examples(self) -> tuple[Example, ...]:
        return self.suite.sample(self.count) if self.suite else ()

    def __len__(self) -> int:
        return len(self.examples) or len(self.prompts)

    def __contains__(self, example: object) -> bool:
        """Whether the example is used, with its answer or as a prompt."""
        if not isinstance(example, Example):
            return False
        return example in self.examples or example.prompt in self.prompts

    def to_json(self) -> dict[str, object]:
        """The digests for a lock: sha256 over the canonical JSON of [prompt, completion] or of the prompt."""
        if self.suite is None:
            return {"prompts": [_digest(prompt) for prompt in self.prompts]}
        used = [example_digest(example) for example in self.examples]
        return {"suite": self.suite.name, "suite_digest": self.suite.digest, "examples": used}


def used_in(sets: Iterable[CalibrationSet], suites: Iterable[Suite]) -> frozenset[Example]:
    """The examples of the suites that are in one of the sets: results are judged on the others."""
    known = list(sets)
    return frozenset(
        example for suite in suites for example in suite.examples if any(example in used for used in known)
    )


def example_digest(example: Example) -> str:
    """sha256 over the canonical JSON of [prompt, completion]."""
    return _digest([example.prompt, example.completion])


def _digest(content: object) -> str:
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
