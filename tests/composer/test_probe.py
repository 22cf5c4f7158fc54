"""A probe against the evaluations it stands for."""

from dataclasses import replace

import pytest
import torch

from composer.delta import Layout, LowRank
from composer.errors import Mismatch
from composer.evaluate import LoadedModel, evaluate, load_model
from composer.probe import Member, probe, weighted_sum
from composer.suite import Example, Kind, Suite
from tests.composer.small_model import save_llama


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(save_llama(tmp_path_factory.mktemp("llama")), device="cpu")


def suite(name: str, kind: Kind = "target", count: int = 6) -> Suite:
    examples = tuple(Example(f"{name} question {number}", f"{number} {name} yes") for number in range(count))
    return Suite(name, kind, "", True, examples)


def member(name: str, seed: int, weight: float = 1.0, size: float = 0.2) -> Member:
    generator = torch.Generator().manual_seed(seed)
    deltas = [
        LowRank(
            module := f"model.layers.{layer}.self_attn.{projection}",
            f"{module}.weight",
            Layout.LINEAR,
            torch.randn(3, 32, generator=generator),
            torch.randn(outputs, 3, generator=generator),
            size,
        )
        for layer in (0, 1)
        for projection, outputs in (("q_proj", 32), ("v_proj", 16))
    ]
    return Member(name, deltas, weight, suite(name))


MEMBERS = [member("red", 1), member("green", 2, weight=0.5), member("blue", 3, weight=-2.0)]
GUARD = suite("guard", "guard")


def nll(loaded: LoadedModel, measured: Suite, deltas: object = (), k: int = 3) -> float:
    return evaluate(loaded, measured, deltas, limit=k)[0].value  # pyright: ignore[reportArgumentType]


def test_every_number_of_a_probe_is_the_evaluation_it_stands_for(loaded: LoadedModel) -> None:
    result = probe(loaded, MEMBERS, [GUARD], k=3)
    pair = result.pair("blue", "red")
    assert pair is not None
    red, blue = pair.effects
    together = weighted_sum([MEMBERS[0], MEMBERS[2]])
    assert red.base == pytest.approx(nll(loaded, MEMBERS[0].suite), rel=1e-5)
    assert red.alone == pytest.approx(nll(loaded, MEMBERS[0].suite, MEMBERS[0].deltas), rel=1e-5)
    assert red.combined == pytest.approx(nll(loaded, MEMBERS[0].suite, together), rel=1e-5)
    assert blue.loss == pytest.approx(blue.combined - blue.alone, abs=1e-6)
    (guard,) = pair.guards
    assert guard.base == pytest.approx(nll(loaded, GUARD), rel=1e-5)
    assert guard.combined == pytest.approx(nll(loaded, GUARD, together), rel=1e-5)
    assert guard.rise == pytest.approx(guard.combined - max(guard.alone.values()), abs=1e-6)


def test_three_members_give_three_pairs_and_the_whole(loaded: LoadedModel) -> None:
    result = probe(loaded, MEMBERS, k=2)
    assert [outcome.members for outcome in result.pairs] == [("red", "green"), ("red", "blue"), ("green", "blue")]
    assert result.whole.members == ("red", "green", "blue")
    whole = nll(loaded, MEMBERS[1].suite, weighted_sum(MEMBERS), k=2)
    assert result.whole.effects[1].combined == pytest.approx(whole, rel=1e-5)
    assert result.seconds > 0


def test_a_partner_of_weight_zero_costs_nothing_and_takes_nothing_of_the_gain(loaded: LoadedModel) -> None:
    result = probe(loaded, [MEMBERS[0], replace(MEMBERS[1], weight=0.0)], k=3)
    (pair,) = result.pairs
    assert result.whole == pair
    assert pair.effects[0].loss == pytest.approx(0.0, abs=1e-5)
    assert pair.effects[1].combined == pytest.approx(nll(loaded, MEMBERS[1].suite, MEMBERS[0].deltas), rel=1e-5)


def test_the_risk_is_the_loss_of_the_member_that_suffers_most(loaded: LoadedModel) -> None:
    small, large = member("small", 4, size=0.02), member("large", 5, size=1.5)
    (pair,) = probe(loaded, [small, large], k=4).pairs
    assert pair.worst.loss == max(effect.loss for effect in pair.effects)
    assert pair.worst.loss_stderr is not None
    assert pair.worst.loss_stderr > 0


def test_the_gain_kept_is_the_part_of_the_improvement_that_is_left(loaded: LoadedModel) -> None:
    idle = Member("idle", (), 1.0, suite("idle"))
    helpful = trained_to(loaded, MEMBERS[0])
    (pair,) = probe(loaded, [helpful, idle], k=3).pairs
    red, unchanged = pair.effects
    assert red.alone < red.base
    assert red.kept == pytest.approx(1.0, abs=1e-4)
    assert unchanged.kept is None


def trained_to(loaded: LoadedModel, untrained: Member) -> Member:
    """The member with whichever sign of its deltas helps its suite: to first order, one of the two does."""
    signs = [
        replace(untrained, deltas=[replace(delta, scale=sign * 0.01) for delta in untrained.deltas]) for sign in (1, -1)
    ]
    return min(signs, key=lambda one: nll(loaded, one.suite, one.deltas))


def test_the_same_examples_are_measured_every_time_and_one_example_has_no_error(loaded: LoadedModel) -> None:
    first, second = probe(loaded, MEMBERS[:2], k=1), probe(loaded, MEMBERS[:2], k=1)
    assert first.pairs == second.pairs
    assert first.pairs[0].effects[0].loss_stderr is None


@pytest.mark.parametrize(("members", "k"), [(MEMBERS[:1], 4), ([MEMBERS[0], MEMBERS[0]], 4), (MEMBERS, 0)])
def test_a_probe_of_one_member_of_twins_or_of_no_examples_is_refused(
    loaded: LoadedModel, members: list[Member], k: int
) -> None:
    with pytest.raises(Mismatch, match="at least two members"):
        probe(loaded, members, k=k)
