"""Protected adapters: consequences of their deltas alone, against a dense reference."""

from collections.abc import Sequence
from dataclasses import replace
from math import hypot

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from composer.conflicts.examine import Evidence, examine
from composer.conflicts.report import conflicts
from composer.deltas.delta import Delta, Layout, LowRank
from composer.deltas.lowrank import Grams
from composer.deltas.variants.load import LoadedAdapter
from composer.errors import ComposerError, Mismatch, NotSupported
from composer.evaluation.model import LoadedModel
from composer.formats.recipes.methods import effective_weights, parse_settings
from composer.formats.recipes.weights import Weight, parse_rule, weights_of
from composer.methods.combine import combine_deltas
from composer.methods.protect import project_out_protected
from tests.composer.small_model import Load, dense

OUTPUTS, INPUTS = 24, 17
SIDES = ("both", "input", "output")
Pair = tuple[torch.Tensor, torch.Tensor]  # B, A
seeds = st.integers(0, 2**32)


def pair(seed: int, rank: int) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(OUTPUTS, rank, generator=generator), torch.randn(rank, INPUTS, generator=generator)


def held(like: LoadedAdapter, pair: Pair, layout: Layout = Layout.LINEAR) -> LoadedAdapter:
    return replace(
        like, deltas=(LowRank(module="m", weight="m.weight", layout=layout, A=pair[1], B=pair[0], scale=1.0),)
    )


def moved(like: LoadedAdapter, pairs: Sequence[Pair], side: str, layout: Layout = Layout.LINEAR) -> torch.Tensor:
    """The first of the deltas, dense, off all others, which are protected."""
    protect = list(range(2, len(pairs) + 1))
    parsed = parse_settings("stack", {"protect": protect, "protect_side": side}).with_tied("shared")
    adapters = [held(like, pair, layout) for pair in pairs]
    return dense(project_out_protected(adapters, weights_of([1.0] * len(pairs)), parsed)[0].deltas[0])


def reference(pairs: Sequence[Pair], side: str) -> torch.Tensor:
    X, *others = (B.double() @ A.double() for B, A in pairs)
    for end, turn in (("output", lambda X: X), ("input", lambda X: X.T)):
        if side in ("both", end):
            spans = [torch.empty(turn(X).shape[0], 0, dtype=torch.float64)]
            for other in map(turn, others):
                U, sigma, _ = torch.linalg.svd(other, full_matrices=False)
                spans.append(U[:, sigma > 1e-5 * sigma[0]])
            U, sigma, _ = torch.linalg.svd(torch.cat(spans, 1), full_matrices=False)
            U = U[:, sigma > 1e-5]
            X = turn(turn(X) - U @ (U.T @ turn(X)))
    return X


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@settings(max_examples=40, deadline=None)
@given(seeds, st.lists(st.integers(1, 5), min_size=1, max_size=2), st.sampled_from(SIDES), st.sampled_from(Layout))
def test_others_lose_what_a_dense_projection_takes(
    red: LoadedAdapter, seed: int, ranks: list[int], side: str, layout: Layout
) -> None:
    pairs = [pair(seed + index, rank) for index, rank in enumerate((4, *ranks))]
    assert error(moved(red, pairs, side, layout), reference(pairs, side)) < 1e-5


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(-6, 6), st.sampled_from(SIDES))
def test_a_protected_delta_protects_the_same_however_its_file_writes_it(
    red: LoadedAdapter, seed: int, power: int, side: str
) -> None:
    """Scales moved between the factors, a change of basis, and a direction that is not used at all."""
    (B, A), other, beside = pair(seed, 4), pair(seed + 1, 5), pair(seed + 2, 3)
    mix = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(seed)))[0]
    unused = torch.randn(1, INPUTS, generator=torch.Generator().manual_seed(seed))
    rewritten = [
        (B * 10.0**power, A / 10.0**power), (B @ mix, mix.T @ A),
        (torch.cat([B, torch.zeros(OUTPUTS, 1)], 1), torch.cat([A, unused])),
    ]  # fmt: skip
    want = reference([other, (B, A), beside], side)
    for written in rewritten:
        assert error(moved(red, [other, written, beside], side), want) < 1e-5


@settings(max_examples=40, deadline=None)
@given(seeds, st.floats(-6, 6), st.sampled_from(SIDES))
def test_a_small_protected_delta_is_protected_as_a_large_one_is(
    red: LoadedAdapter, seed: int, power: float, side: str
) -> None:
    (B, A), other, beside = pair(seed, 4), pair(seed + 1, 5), pair(seed + 2, 3)
    pairs = [other, (B * 10.0**power, A), beside]
    assert error(moved(red, pairs, side), reference([other, (B, A), beside], side)) < 1e-5


@given(seeds, st.sampled_from(SIDES))
def test_an_untrained_protected_delta_changes_nothing(red: LoadedAdapter, seed: int, side: str) -> None:
    (B, A), other = pair(seed, 4), pair(seed + 1, 3)
    assert error(moved(red, [other, (B * 0, A)], side), dense(held(red, other).deltas[0])) < 1e-6
    assert error(moved(red, [other, (B * 0, A), (B, A)], side), reference([other, (B, A)], side)) < 1e-5


def test_a_delta_that_lies_in_a_protected_one_becomes_zero(red: LoadedAdapter) -> None:
    """Exactly zero, not noise from which a report would compute quotients."""
    assert float(moved(red, [pair(1, 3), pair(1, 3)], "both").norm()) == 0
    report = conflicts([red, replace(red, name="again")], [1.0, 1.0], parse_settings("stack", {"protect": 1}))
    assert report.pairs[0].numbers.cosine == 0
    assert report.members[1].share == 0


@pytest.mark.parametrize("side", SIDES)
def test_an_embedding_and_a_head_of_one_tensor_are_turned_to_each_other(red: LoadedAdapter, side: str) -> None:
    """The outputs of one are the inputs of the other: `protect_side` refers to the protected one's orientation."""
    (B, A), (B_head, A_head) = pair(1, 3), pair(2, 3)
    parsed = parse_settings("stack", {"protect": 2, "protect_side": side}).with_tied("shared")
    adapters = [held(red, (A.T, B.T), Layout.EMBEDDING), held(red, (B_head, A_head))]
    actual = project_out_protected(adapters, weights_of([1.0, 1.0]), parsed)[0].deltas[0]
    assert error(dense(actual).T, reference([(B, A), (B_head, A_head)], side)) < 1e-5


@pytest.mark.parametrize(
    "method", ["knots_ties", "knots_dare_ties", "core_ties", "core_dare_ties", "ctm_ties", "pico_core_ties"]
)
def test_noise_in_the_factors_decides_on_nothing_beside_a_protected_one(red: LoadedAdapter, method: str) -> None:
    pairs, draw = [pair(1, 3), pair(2, 7), pair(3, 1)], torch.Generator().manual_seed(4)

    def combined(noise: float) -> torch.Tensor:
        shaken = [
            (
                B * (1 + noise * torch.randn(B.shape, generator=draw)),
                A * (1 + noise * torch.randn(A.shape, generator=draw)),
            )
            for B, A in pairs
        ]
        deltas = combine_deltas([held(red, pair) for pair in shaken], [1.0, 0.7, -0.6], method, {"protect": [1]}).deltas
        return sum((dense(delta) for delta in deltas), torch.zeros(()))

    exact = combined(0.0)
    for _ in range(5):
        assert error(combined(1e-7), exact) < 1e-4


def test_only_what_is_moved_becomes_another_delta(red: LoadedAdapter, green: LoadedAdapter) -> None:
    parsed = parse_settings("stack", {"protect": 1}).with_tied("shared")
    one, other = project_out_protected([red, green], weights_of([1.0, 1.0]), parsed)
    assert one is red
    changed = {
        now.module for now, before in zip(other.deltas, green.deltas, strict=True) if error(dense(now), dense(before))
    }
    assert changed == {f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)}, "red has no o_proj"
    assert [delta.module for delta in other.deltas[-3:]] == [delta.module for delta in green.deltas[-3:]]


@pytest.mark.parametrize("given", [[1.0, 0.0], [1.0, Weight(0.0, (parse_rule("q_proj=0"),))]])
def test_a_protected_adapter_that_does_not_take_part_is_refused(
    red: LoadedAdapter, green: LoadedAdapter, given: list[Weight | float]
) -> None:
    with pytest.raises(Mismatch, match="Leave it out of protect, or give it a weight") as refused:
        combine_deltas([red, green], given, "stack", {"protect": 2})
    assert refused.value.code == "protect_idle"
    with pytest.raises(Mismatch, match="nothing is protected"):
        conflicts([red, green], given, parse_settings("stack", {"protect": 2}))


def test_where_a_rule_gives_a_protected_adapter_no_weight_nothing_is_protected(
    red: LoadedAdapter, green: LoadedAdapter
) -> None:
    weight = Weight(1.0, (parse_rule("0=0"),))
    actual = combine_deltas([red, green], [weight, 1.0], "stack", {"protect": 1}).deltas
    ours = {delta.module: dense(delta) for delta in actual if delta.module.endswith("0.self_attn.q_proj")}
    theirs = {delta.module: dense(delta) for delta in green.deltas}
    assert ours
    assert all(torch.equal(own, theirs[module]) for module, own in ours.items())


def test_what_has_no_factors_is_refused_only_where_something_is_to_be_moved(red: LoadedAdapter, load: Load) -> None:
    apart = load("apart", 7, r=2, target_modules=["gate_proj"], use_dora=True)
    beside = load("beside", 8, r=2, target_modules=["q_proj"], use_dora=True)
    for protect in (1, 2):
        assert combine_deltas([red, apart], [1.0, 1.0], "stack", {"protect": protect}).deltas
        with pytest.raises(NotSupported, match=r"q_proj has no factors.*without protect"):
            combine_deltas([red, beside], [1.0, 1.0], "stack", {"protect": protect})


def norm(deltas: Sequence[Delta]) -> float:
    """The norm of their sum, over all modules."""
    own = [delta for delta in deltas if isinstance(delta, LowRank)]
    assert len(own) == len(deltas)
    by_module = {delta.module: [other for other in own if other.module == delta.module] for delta in own}
    return hypot(*(float(Grams.of(deltas).inner().sum()) ** 0.5 for deltas in by_module.values()))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("method", ["stack", "mean"])
def test_a_report_is_of_the_deltas_that_are_combined(
    red: LoadedAdapter, green: LoadedAdapter, load: Load, method: str, side: str
) -> None:
    adapters, weights = [red, green, load("blue", 3)], [1.0, 0.7, -0.5]
    settings: dict[str, object] = {"protect": "1", "protect_side": side}
    parsed = parse_settings(method, settings)
    report = conflicts(adapters, weights, parsed)
    plain = conflicts(adapters, weights, parse_settings(method))
    moved_off = project_out_protected(adapters, weights_of(weights), parsed)
    parts = [
        weight.of("m") * norm(one.deltas)
        for one, weight in zip(moved_off, effective_weights(weights, parsed), strict=True)
    ]
    energy = norm(combine_deltas(adapters, weights, method, settings).deltas) ** 2
    assert report.together.interference == pytest.approx(energy / sum(part**2 for part in parts))
    assert report.together.interference != pytest.approx(plain.together.interference, rel=1e-3)
    for pair in report.pairs[:2]:
        assert pair.numbers.cosine == pytest.approx(0, abs=1e-6)
        assert pair.numbers.interference == pytest.approx(1, abs=1e-6)
        if side != "output":
            assert pair.numbers.input_overlap == pytest.approx(0, abs=1e-6)
    cosines = [examined.pairs[2].numbers.cosine for examined in (report, plain)]
    assert cosines[0] != pytest.approx(cosines[1], rel=1e-3), "both are off the protected one"
    assert report.members[0].retention == pytest.approx(1 / 1.2 if method == "mean" else 1.0, abs=1e-5)


def test_activations_are_those_of_the_deltas_that_are_combined(
    red: LoadedAdapter, green: LoadedAdapter, loaded: LoadedModel
) -> None:
    evidence = Evidence(load=lambda: loaded, prompts=["hi", "you"])
    how = parse_settings("stack", {"protect": 1})
    (pair,), (plain,) = (
        examine([red, green], [1.0, 1.0], settings, evidence=evidence).pairs
        for settings in (how, parse_settings("stack"))
    )
    assert (pair.evidence, plain.evidence) == ("activations", "activations")
    assert pair.risk != pytest.approx(plain.risk)


@pytest.mark.parametrize("value", ["a1", "", "1,", "0", "1.5", True, None, [1, "x"]])
def test_what_protect_takes_is_said_whatever_it_was_given(value: object) -> None:
    with pytest.raises(ComposerError, match="It is the numbers of inputs, counted from 1: 1, or 1,3"):
        parse_settings("stack", {"protect": value})
