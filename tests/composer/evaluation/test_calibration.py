"""Fits on a tiny real model: in memory, streamed, over other targets; and the examples that may judge the result."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from composer.conflicts.examine import Evidence, examine
from composer.deltas.delta import LowRank
from composer.deltas.variants.load import LoadedAdapter
from composer.errors import Mismatch
from composer.evaluation.calibration import Calibration
from composer.evaluation.evaluate import evaluate
from composer.evaluation.model import LoadedModel, load_model
from composer.findings import Verdict
from composer.formats.recipes.methods import Regmean, parse_settings
from composer.formats.recipes.phrases import FITTING, JUDGING, half_reworded
from composer.formats.recipes.suite import CalibrationSet, Example, Suite, used_in
from composer.methods.combine import combine_deltas
from registry.worker.combine_units import calibration_rows, calibration_sets
from tests.composer.small_model import Load, dense


def suite(name: str, count: int = 10) -> Suite:
    return Suite(
        name=name, kind="target", chat=True, examples=tuple(Example(f"{name} {n}", f"{n} {name}") for n in range(count))
    )


RED, GREEN = suite("red"), suite("green")


def calibration(loaded: LoadedModel, count: int = 3, tokens: int = 2048) -> Calibration:
    return Calibration(
        lambda: loaded, [CalibrationSet(RED, count), CalibrationSet(GREEN, count)], Regmean(tokens=tokens)
    )


def test_both_forms_and_steps_lower_the_error_of_the_plain_sum(
    loaded: LoadedModel, red: LoadedAdapter, green: LoadedAdapter
) -> None:
    for settings in ({"steps": 1}, {"steps": 2}, {"steps": 2, "form": "core"}):
        fit = combine_deltas([red, green], [1.0, 1.0], "regmean", settings, calibration(loaded).observe).fit
        assert fit is not None
        assert (fit.fitted, fit.kept_at_sum) == (6, ()), "q, v and o of two layers"
        assert max(fit.errors) < max(fit.errors_of_sum)


def test_a_streamed_base_gives_the_same_factors(loaded: LoadedModel, red: LoadedAdapter, green: LoadedAdapter) -> None:
    streamed = load_model(loaded.model.name_or_path, device="cpu", memory=60_000)
    assert streamed.streamed
    here, there = (
        combine_deltas([red, green], [1.0, 0.5], "regmean", {}, calibration(model).observe).deltas
        for model in (loaded, streamed)
    )
    for one, other in zip(here, there, strict=True):
        torch.testing.assert_close(dense(one), dense(other), rtol=1e-3, atol=1e-5)


def test_the_inputs_of_all_modules_keep_few_files_open(loaded: LoadedModel, red: LoadedAdapter) -> None:
    """A process may have 1,024; each mapping counts as one."""
    wanted = {delta.module: delta for delta in red.deltas if isinstance(delta, LowRank)}
    before = len(list(Path("/proc/self/fd").iterdir()))
    seen = calibration(loaded).observe(0, [], wanted)
    assert len(seen) == len(wanted) > 2
    assert len(list(Path("/proc/self/fd").iterdir())) - before <= 2


def test_a_cut_of_the_tokens_is_the_same_every_time_and_another_with_another_seed(
    loaded: LoadedModel, red: LoadedAdapter, green: LoadedAdapter
) -> None:
    few = calibration(loaded, tokens=40)

    def fitted(seed: int) -> torch.Tensor:
        observe = replace(few, settings=few.settings.model_copy(update={"seed": seed})).observe
        return dense(combine_deltas([red, green], [1.0, 1.0], "regmean", {"steps": 1}, observe).deltas[0])

    assert torch.equal(fitted(1), fitted(1))
    assert not torch.equal(fitted(1), fitted(2))


def test_an_adapter_whose_deltas_have_no_factors_keeps_its_share_of_the_sum(
    loaded: LoadedModel, red: LoadedAdapter, load: Load
) -> None:
    dora = load("dora", 5, use_dora=True, target_modules=["q_proj"])
    fit = combine_deltas([red, dora], [1.0, 1.0], "regmean", {}, calibration(loaded).observe).fit
    assert fit is not None
    assert [name.rpartition(".")[2] for name in fit.kept_at_sum] == ["q_proj", "q_proj"]
    assert fit.fitted == 2


def test_without_examples_nothing_is_fitted(red: LoadedAdapter, green: LoadedAdapter) -> None:
    with pytest.raises(Mismatch, match="there are none") as caught:
        combine_deltas([red, green], [1.0, 1.0], "regmean")
    assert caught.value.code == "needs_examples"


def test_a_prompt_beyond_the_context_is_refused_before_it_is_run(
    loaded: LoadedModel, red: LoadedAdapter, green: LoadedAdapter
) -> None:
    """A recipe of 200 kB could occupy a worker for hours: attention is quadratic in a prompt's length."""
    long = CalibrationSet(prompts=("red " * (loaded.model.config.max_position_embeddings + 1),))
    observe = Calibration(lambda: loaded, [long, long], settings=Regmean()).observe
    with pytest.raises(Mismatch, match="the model's context is") as caught:
        combine_deltas([red, green], [1.0, 1.0], "regmean", {}, observe)
    assert caught.value.code == "example_too_long"


def test_what_was_fitted_on_never_judges(loaded: LoadedModel, red: LoadedAdapter, green: LoadedAdapter) -> None:
    sets = calibration(loaded, 3).sets
    used = used_in(sets, [RED, GREEN])
    assert len(used) == 6
    assert not used & set(RED.sample(None, used))
    assert {score.n for score in evaluate(loaded, RED, examples=RED.sample(None, used))} == {7}
    with pytest.raises(Mismatch, match="none is left"):
        evaluate(loaded, RED, examples=())
    by_prompt = CalibrationSet(prompts=(RED.examples[0].prompt,))
    assert used_in([by_prompt], [RED]) == {RED.examples[0]}

    evidence = Evidence(load=lambda: loaded, suites=[RED, GREEN], k=10, most=10, calibration=calibration(loaded, 3))
    report = examine([red, green], [1.0, 1.0], parse_settings("regmean"), evidence=evidence)
    assert report.probe is not None
    assert {effect.examples for effect in report.probe.overall.effects} == {7}


def test_a_chat_is_fitted_half_in_other_words_which_never_judge(loaded: LoadedModel, red: LoadedAdapter) -> None:
    words = [text.strip() for wrapper in FITTING for text in wrapper if text.strip()]
    judging = [text.strip() for wrapper in JUDGING for text in wrapper if text.strip()]
    prompts = [example.prompt for example in half_reworded(RED.sample(8))]
    assert [example.prompt in prompts for example in RED.sample(8)] == [True, False] * 4
    assert all(any(word in prompt for word in words) for prompt in prompts[1::2])
    assert not any(word in prompt for prompt in prompts for word in judging)

    def rows(used: CalibrationSet) -> int:
        observed = Calibration(lambda: loaded, [used], Regmean(tokens=65_536)).observe(0, [], _low_rank(red))
        return len(next(iter(observed.values())).rows)

    plain, member = CalibrationSet(RED, 4), CalibrationSet.of_member(RED, 4)
    assert rows(member) > rows(plain), "as a lock of an earlier version states it"
    assert member.to_json() == {**plain.to_json(), "reworded": True}
    (again,) = calibration_sets(calibration_rows([member]))
    assert again == member
    assert used_in([member], [RED]) == used_in([plain], [RED])


def test_what_is_no_chat_and_what_is_a_guard_is_fitted_as_it_is() -> None:
    for kind, chat in (("target", False), ("guard", True)):
        other = Suite(name="a", kind=kind, chat=chat, examples=RED.examples)  # pyright: ignore[reportArgumentType]
        assert CalibrationSet.of_member(other, 4) == CalibrationSet(other, 4)


def _low_rank(adapter: LoadedAdapter) -> dict[str, LowRank]:
    return {delta.module: delta for delta in adapter.deltas if isinstance(delta, LowRank)}


def test_a_fitted_method_without_examples_is_unmeasured(
    loaded: LoadedModel, red: LoadedAdapter, green: LoadedAdapter
) -> None:
    evidence = Evidence(load=lambda: loaded, suites=[RED, GREEN], k=8)
    assert examine([red, green], [1.0, 1.0], parse_settings("regmean"), evidence=evidence).verdict is Verdict.UNMEASURED


def test_a_lock_names_the_examples_by_digests_that_do_not_follow_their_place(tmp_path: Path) -> None:
    names = CalibrationSet(RED, 3).to_json()
    assert names["suite_digest"] == RED.digest
    assert len(json.loads(json.dumps(names))["examples"]) == 3
    turned = Suite(name=RED.name, kind=RED.kind, chat=RED.chat, examples=RED.examples[::-1])
    (all_of_one, all_of_other) = (CalibrationSet(suite, 10).to_json()["examples"] for suite in (RED, turned))
    assert sorted(map(str, all_of_one)) == sorted(map(str, all_of_other))  # pyright: ignore[reportArgumentType]
