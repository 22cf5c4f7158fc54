"""Two adapters that want other answers to the same prompts, on a tiny model: one adapter serves both by phrases."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from composer.conflicts.evidence.bench import Pass
from composer.conflicts.evidence.outcome import Limits
from composer.deltas.variants.load import LoadedAdapter, load_deltas
from composer.evaluation.measure import ExampleScore
from composer.evaluation.model import load_model
from composer.findings import Verdict
from composer.formats.checkpoints.checkpoint import open_checkpoint
from composer.formats.recipes.suite import Example, Suite, example_digest
from composer.optimize.candidates import PLAIN_FIT
from composer.optimize.combiner import pass_runner
from composer.optimize.optimize import expected_passes, optimize
from composer.optimize.problem import SearchEffort, SearchMember, SearchProblem
from composer.optimize.report import AS_SET, ONE_ADAPTER, WITH_PHRASES, Confirmed, OptimizeReport, choose
from tests.composer.small_model import SIZES, WIDTHS, save_tokenizer

ANSWERS = ("red", "blue")
LOSS = 1.3
"""Nats a token: between what the worst member loses with phrases, 0.8, and without, 2.1."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("selector") / "base"
    torch.manual_seed(0)
    sizes = {**SIZES, **WIDTHS, "hidden_size": 128, "initializer_range": 0.1}
    LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False)).save_pretrained(directory)
    save_tokenizer(directory)
    return directory


def trained(base: Path, answer: str, seed: int) -> LoadedAdapter:
    """An adapter that answers every prompt of its task in this way, whatever is said before it."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    modules = ["q_proj", "v_proj", "o_proj", "down_proj"]
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules=modules)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    factors = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(factors, lr=1e-2)
    answer_ids = tokenizer(f" {answer}")["input_ids"]
    for step in range(40):
        before = ("", "one: ", "in short, ", "be kind. ", "Abc: ")[step % 5]
        prompts = [tokenizer(f"{before}case {(step * 8 + row) % 32 + 16}")["input_ids"] for row in range(8)]
        ids = torch.tensor([prompt + answer_ids for prompt in prompts])
        logits = adapted(input_ids=ids).logits[:, len(prompts[0]) - 1 : -1]
        loss = cross_entropy(logits.flatten(0, 1), torch.tensor(answer_ids).repeat(8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    directory = base.with_name(answer)
    adapted.save_pretrained(str(directory))
    return replace(load_deltas(directory, open_checkpoint(base).architecture), name=answer)


@pytest.fixture(scope="module")
def problem(base: Path) -> SearchProblem:
    loaded = load_model(base, device="cpu")
    members = [
        SearchMember(adapter=trained(base, name, seed), suite=suite_of(name), phrase=phrase)
        for seed, (name, phrase) in enumerate(zip(ANSWERS, ("aaa.", "222:"), strict=True), start=1)
    ]
    limits = Limits(loss=LOSS, answers=0.0)
    return SearchProblem(load=lambda: loaded, members=members, limits=limits, effort=SearchEffort(search=8, confirm=8))


def suite_of(answer: str) -> Suite:
    examples = tuple(Example(f"case {number}", f" {answer}") for number in range(16, 48))
    return Suite(name=answer, kind="target", chat=False, ends=False, examples=examples)


@pytest.fixture(scope="module")
def report(problem: SearchProblem) -> OptimizeReport:
    return optimize(problem)


def test_a_contradictory_pair_is_refused_as_it_is_and_confirmed_with_phrases(report: OptimizeReport) -> None:
    by_answer = {row.answer: row for row in reversed(report.best)}
    plain, selector = by_answer[ONE_ADAPTER], by_answer[WITH_PHRASES]
    assert (plain.candidate.name, plain.verdict) == (PLAIN_FIT, Verdict.WARN)
    assert (selector.verdict, selector.candidate.phrases) == (Verdict.OK, ("aaa.", "222:"))
    assert report.choice is selector.candidate
    assert selector.worst_kept > plain.worst_kept + 0.2
    without = max(effect.combined - effect.alone for effect in report.without_phrases)
    assert without > max(effect.loss for effect in selector.outcome.effects) + 0.2


def test_the_answer_names_the_phrases_the_figure_and_both_candidates(report: OptimizeReport) -> None:
    shown: Any = json.loads(json.dumps(report.to_json()))
    assert shown["headline"].startswith(f"{WITH_PHRASES}: {PLAIN_FIT}, with phrases, confirmed on")
    assert shown["choice"]["phrases"] == ["aaa.", "222:"]
    assert shown["separability"][0]["share"] < 0.9
    assert [row["answer"] for row in shown["best"]] == [ONE_ADAPTER, WITH_PHRASES, ONE_ADAPTER, AS_SET]
    assert [row["member"] for row in shown["without_phrases"]] == ["red", "blue"]


def test_phrases_are_made_of_the_suites_names_where_none_are_given(problem: SearchProblem) -> None:
    plain = replace(problem, members=[replace(member, phrase="") for member in problem.members])
    assert plain.phrases == ("Red:", "Blue:")
    assert plain.wants_phrases
    twice = replace(plain, members=[plain.members[0], replace(plain.members[1], suite=plain.members[0].suite)])
    assert not twice.wants_phrases, "two members with one suite want the same answers"


def test_members_alone_are_measured_without_phrases_since_that_is_what_their_users_have(
    problem: SearchProblem, report: OptimizeReport, tmp_path: Path
) -> None:
    optimize(problem, journal=tmp_path / "search.jsonl")
    rows = [row for line in (tmp_path / "search.jsonl").read_text().splitlines()[1:] for row in json.loads(line)]
    plain = {example_digest(example) for member in problem.members for example in member.suite.examples}
    assert {example in plain for who, _, example, *_ in rows if not who.startswith("[")} == {True}
    with_phrases = [example in plain for who, _, example, *_ in rows if '["aaa.","222:"]' in who]
    assert set(with_phrases) == {True, False}, "and the choice also without its phrases"
    assert report.choice is not None


def test_a_plain_adapter_that_is_confirmed_is_preferred(report: OptimizeReport) -> None:
    plain, selector, *_ = report.best

    def with_verdict(one: Confirmed, verdict: Verdict) -> Confirmed:
        return replace(one, verdict=verdict, excess=0.0)

    both = [with_verdict(selector, Verdict.OK), with_verdict(plain, Verdict.OK)]
    assert choose(both) is plain.candidate
    assert choose([with_verdict(plain, Verdict.UNDECIDED), selector]) is selector.candidate
    assert choose([plain]) is None


def test_given_phrases_are_tried_beside_a_plain_adapter_that_keeps_every_limit(problem: SearchProblem) -> None:
    loose = optimize(replace(problem, limits=Limits(loss=100.0, answers=0.0)))
    assert [row.answer for row in loose.best] == [ONE_ADAPTER, WITH_PHRASES, ONE_ADAPTER, AS_SET]
    assert loose.choice is loose.best[0].candidate
    assert loose.without_phrases == ()


def test_a_search_elsewhere_makes_the_same_choice(problem: SearchProblem, report: OptimizeReport) -> None:
    runner = pass_runner(problem)

    class Elsewhere:
        def measure(self, wanted: Pass) -> Sequence[ExampleScore]:
            return runner(wanted.who, [(suite, example) for _, suite, example in wanted.keys])

        def spread(self, passes: Sequence[Pass]) -> Sequence[tuple[Pass, Sequence[ExampleScore]]]:
            return [(wanted, self.measure(wanted)) for wanted in passes]

    again = optimize(problem, elsewhere=Elsewhere())
    assert (again.choice, again.passes) == (report.choice, report.passes)
    assert expected_passes(problem) > 0
