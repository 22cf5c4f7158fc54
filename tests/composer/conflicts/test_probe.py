"""A probe against the evaluations that it replaces."""

import json
from dataclasses import replace
from math import inf

import pytest
import torch

from composer.conflicts.evidence.bench import Runner
from composer.conflicts.evidence.interval import interval
from composer.conflicts.evidence.outcome import NOTICEABLE_NATS, Limits
from composer.conflicts.evidence.probe import Effort, Probed, pass_runner, probe, usual_most, weighted, weighted_sum
from composer.deltas.delta import Layout, LowRank
from composer.errors import Mismatch
from composer.evaluation.evaluate import evaluate
from composer.evaluation.model import LoadedModel
from composer.findings import Verdict
from composer.formats.recipes.suite import Example, Kind, Suite
from composer.formats.recipes.weights import Weight, parse_rule
from tests.composer.elsewhere import Other


def suite(name: str, kind: Kind = "target", count: int = 6) -> Suite:
    examples = tuple(Example(f"{name} question {number}", f"{number} {name} yes") for number in range(count))
    return Suite(name=name, kind=kind, chat=True, examples=examples)


def member(name: str, seed: int, weight: float = 1.0, size: float = 0.2) -> Probed:
    generator = torch.Generator().manual_seed(seed)
    deltas = [
        LowRank(
            module=f"model.layers.{layer}.self_attn.{projection}",
            weight=f"model.layers.{layer}.self_attn.{projection}.weight",
            layout=Layout.LINEAR,
            A=torch.randn(3, 32, generator=generator),
            B=torch.randn(outputs, 3, generator=generator),
            scale=size,
        )
        for layer in (0, 1)
        for projection, outputs in (("q_proj", 32), ("v_proj", 16))
    ]
    return Probed(name, deltas, weight, suite(name))


MEMBERS = [member("red", 1), member("green", 2, weight=0.5), member("blue", 3, weight=-2.0)]
GUARD = suite("guard", "guard")


def nll(loaded: LoadedModel, measured: Suite, deltas: object = (), k: int = 3) -> float:
    return evaluate(loaded, measured, deltas, measured.sample(k))[0].value  # pyright: ignore[reportArgumentType]


def test_every_number_of_a_probe_is_the_evaluation_it_stands_for(loaded: LoadedModel) -> None:
    result = probe(lambda: loaded, MEMBERS, [GUARD], 3)
    pair = result.pair("blue", "red")
    assert pair is not None
    red, blue = pair.effects
    together = weighted_sum([MEMBERS[0], MEMBERS[2]])
    assert red.base == pytest.approx(nll(loaded, MEMBERS[0].suite), rel=1e-5)
    assert red.alone == pytest.approx(nll(loaded, MEMBERS[0].suite, MEMBERS[0].deltas), rel=1e-5)
    assert red.combined == pytest.approx(nll(loaded, MEMBERS[0].suite, together), rel=1e-5)
    assert blue.loss == pytest.approx(blue.combined - blue.alone, abs=1e-6)
    assert red.alone_weighted is None, "its weight is 1"
    assert blue.alone_weighted == pytest.approx(nll(loaded, MEMBERS[2].suite, weighted_sum([MEMBERS[2]])), rel=1e-5)
    assert blue.alone_weighted is not None
    assert blue.weight_loss == pytest.approx(blue.alone_weighted - blue.alone)
    (guard,) = pair.guards
    assert guard.base == pytest.approx(nll(loaded, GUARD), rel=1e-5)
    assert guard.combined == pytest.approx(nll(loaded, GUARD, together), rel=1e-5)
    assert guard.rise == pytest.approx(guard.combined - max(guard.alone.values()), abs=1e-6)


def test_a_probe_whose_passes_are_run_elsewhere_has_the_same_numbers(loaded: LoadedModel) -> None:
    def not_here() -> LoadedModel:
        raise AssertionError("the base was loaded here")

    growing = Effort(2, 4, Limits(loss=-1e9))
    here = probe(lambda: loaded, MEMBERS, [GUARD], growing)
    other = Other(pass_runner(Runner(lambda: loaded), MEMBERS, [GUARD], weighted_sum))
    there = probe(not_here, MEMBERS, [GUARD], growing, elsewhere=other)
    assert (there.pairs, there.overall) == (here.pairs, here.overall)
    assert not other.alone, "all of it side by side"


def test_three_members_give_three_pairs_and_the_whole(loaded: LoadedModel) -> None:
    result = probe(lambda: loaded, MEMBERS, effort=2)
    assert [outcome.members for outcome in result.pairs] == [("red", "green"), ("red", "blue"), ("green", "blue")]
    assert result.overall.members == ("red", "green", "blue")
    expected = nll(loaded, MEMBERS[1].suite, weighted_sum(MEMBERS), k=2)
    assert result.overall.effects[1].combined == pytest.approx(expected, rel=1e-5)
    assert result.seconds > 0


def test_a_partner_of_weight_zero_costs_nothing_and_takes_nothing_of_the_gain(loaded: LoadedModel) -> None:
    result = probe(lambda: loaded, [MEMBERS[0], replace(MEMBERS[1], weight=0.0)], effort=3)
    (pair,) = result.pairs
    assert result.overall == pair
    assert pair.effects[0].loss == pytest.approx(0.0, abs=1e-5)
    assert pair.effects[1].combined == pytest.approx(nll(loaded, MEMBERS[1].suite, MEMBERS[0].deltas), rel=1e-5)


def test_the_risk_is_the_loss_of_the_member_that_suffers_most(loaded: LoadedModel) -> None:
    small, large = member("small", 4, size=0.02), member("large", 5, size=1.5)
    (pair,) = probe(lambda: loaded, [small, large], effort=4).pairs
    assert pair.worst.loss == max(effect.loss for effect in pair.effects)
    assert pair.worst.loss_stderr is not None
    assert pair.worst.loss_stderr > 0


def test_the_gain_kept_is_the_part_of_the_improvement_that_is_left(loaded: LoadedModel) -> None:
    idle = Probed("idle", (), 1.0, suite("idle"))
    helpful = trained_to(loaded, MEMBERS[0])
    (pair,) = probe(lambda: loaded, [helpful, idle], effort=3).pairs
    red, unchanged = pair.effects
    assert red.alone < red.base
    assert red.kept == pytest.approx(1.0, abs=1e-4)
    assert unchanged.kept is None


def trained_to(loaded: LoadedModel, untrained: Probed) -> Probed:
    """The member with whichever sign of its deltas helps its suite: to first order, one of the two does."""
    signs = [
        replace(untrained, deltas=[replace(delta, scale=sign * 0.01) for delta in untrained.deltas]) for sign in (1, -1)
    ]
    return min(signs, key=lambda one: nll(loaded, one.suite, one.deltas))


def test_the_same_examples_are_measured_every_time_and_one_example_has_no_error(loaded: LoadedModel) -> None:
    first, second = probe(lambda: loaded, MEMBERS[:2], effort=1), probe(lambda: loaded, MEMBERS[:2], effort=1)
    assert first.pairs == second.pairs
    assert first.pairs[0].effects[0].loss_stderr is None
    assert first.pairs[0].effects[0].loss_interval.to_json() is None
    assert first.pairs[0].verdict(Limits()) is Verdict.UNDECIDED, "one example tells no error"
    json.dumps(first.overall.to_json(Limits(loss=inf, guard=inf)), allow_nan=False)


def test_examples_grow_while_something_is_open_and_an_ok_needs_eight(loaded: LoadedModel) -> None:
    red, blue = (replace(member, suite=suite(member.name, count=20)) for member in (MEMBERS[0], MEMBERS[2]))
    patient = Limits(loss=1e9, answers=0.0)
    assert probe(lambda: loaded, [red, blue], effort=Effort(2, 16, patient)).pairs[0].k == 8, "then nothing is too much"
    assert (
        probe(lambda: loaded, [red, blue], effort=Effort(2, 4, patient)).pairs[0].verdict(patient) is Verdict.UNDECIDED
    )
    strict = Limits(loss=-1e9)
    assert probe(lambda: loaded, [red, blue], effort=Effort(2, 16, strict)).pairs[0].k == 2, (
        "harmed beyond what more would say"
    )
    pair = probe(lambda: loaded, [red, blue], effort=8).pairs[0]
    between = Limits(loss=pair.worst.loss, answers=0.0)  # in the middle of its interval: open
    assert probe(lambda: loaded, [red, blue], effort=Effort(8, 18, between)).pairs[0].k in (16, 18)


def test_a_guard_that_is_open_or_rose_keeps_the_probe_growing(loaded: LoadedModel) -> None:
    red, blue = (replace(member, suite=suite(member.name, count=20)) for member in (MEMBERS[0], MEMBERS[2]))
    guard = suite("guard", "guard", count=20)
    unguarded = Limits(loss=1e9, answers=0.0, guard=1e9)
    first = probe(lambda: loaded, [red, blue], [guard], Effort(8, 8, unguarded)).pairs[0].guards[0]
    for limit, k, said in (
        (first.rise, 20, Verdict.UNDECIDED),
        (first.rise_interval.low - 10, 20, Verdict.WARN),
        (first.rise_interval.high + 10, 8, Verdict.OK),
    ):
        limits = replace(unguarded, guard=limit)
        pair = probe(lambda: loaded, [red, blue], [guard], Effort(8, 20, limits)).pairs[0]
        assert pair.k == k
        assert pair.verdict(limits) is said or limit == first.rise, "more examples may decide it"


def test_a_quick_look_stays_one_and_a_full_probe_grows() -> None:
    assert [usual_most(k) for k in (0, 4, 7, 8, 40)] == [0, 4, 7, 32, 40]


def test_what_was_grown_is_what_a_larger_start_would_have_measured(loaded: LoadedModel) -> None:
    chosen = [MEMBERS[0], MEMBERS[1]]
    first = probe(lambda: loaded, chosen, [GUARD], 2).pairs[0]
    limit = first.worst.loss  # in the middle of its interval, so that two examples leave it open
    grown = probe(lambda: loaded, chosen, [GUARD], Effort(2, 4, Limits(loss=limit))).pairs[0]
    direct = probe(lambda: loaded, chosen, [GUARD], 4).pairs[0]
    assert grown.k == 4
    for one, other in zip((*grown.effects, *grown.guards), (*direct.effects, *direct.guards), strict=True):
        assert one.combined == pytest.approx(other.combined, rel=1e-5)
        assert one.base == pytest.approx(other.base, rel=1e-5)


def test_no_example_is_measured_twice(loaded: LoadedModel) -> None:
    passed: list[int] = []
    handle = loaded.model.register_forward_hook(
        lambda _model, _inputs, output: passed.append(output.logits.shape[0]) if output.logits.shape[1] > 1 else None
    )
    try:
        probe(lambda: loaded, MEMBERS, [GUARD], Effort(2, 4, Limits(loss=-1e9)))
        start = sum(passed)
        passed.clear()
        probe(lambda: loaded, MEMBERS, [GUARD], Effort(1, 4))
    finally:
        handle.remove()
    m, k, weighed = len(MEMBERS), 2, 2
    suites, guard = k * m * (m + 2), k * (m**2 + m + 4) // 2
    assert start == suites + guard + k * weighed, "under the base, its member, pairs and whole; weights once for all"
    assert sum(passed) <= 2 * start, "four examples cost no more than four from the start"


def test_the_interval_holds_all_members_together_and_the_risk_is_of_the_worst(loaded: LoadedModel) -> None:
    (pair,) = probe(lambda: loaded, MEMBERS[:2], effort=4).pairs
    for effect in pair.effects:
        assert effect.loss_stderr is not None
        sure = interval(effect.loss, effect.loss_stderr, 4, claims=2)
        assert effect.loss_interval.low == min(sure.low, effect.loss - NOTICEABLE_NATS)
        assert effect.loss_interval.high == max(sure.high, effect.loss + NOTICEABLE_NATS)
    assert pair.risk.low <= pair.worst.loss <= pair.risk.high


def test_weights_by_module_are_what_is_added_there(loaded: LoadedModel) -> None:
    half = Weight(1.0, (parse_rule("0=0.5"), parse_rule("v_proj=0")))
    by_module = {delta.module: delta for delta in weighted(MEMBERS[0].deltas, half) if isinstance(delta, LowRank)}
    assert by_module["model.layers.0.self_attn.q_proj"].scale == pytest.approx(0.1)
    assert by_module["model.layers.0.self_attn.v_proj"].scale == pytest.approx(0.1)
    assert by_module["model.layers.1.self_attn.v_proj"].scale == 0.0
    assert by_module["model.layers.1.self_attn.q_proj"].scale == pytest.approx(0.2)


@pytest.mark.parametrize(("members", "k"), [(MEMBERS[:1], 4), ([MEMBERS[0], MEMBERS[0]], 4), (MEMBERS, 0)])
def test_a_probe_of_one_member_of_twins_or_of_no_examples_is_refused(
    loaded: LoadedModel, members: list[Probed], k: int
) -> None:
    with pytest.raises(Mismatch, match="at least two members"):
        probe(lambda: loaded, members, effort=k)
