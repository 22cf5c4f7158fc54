"""Every method against a dense float64 reference, and the laws that each must satisfy."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from composer.deltas.delta import Additive, Layout, LowRank, RowwiseDelta
from composer.errors import ComposerError
from composer.formats.recipes.methods import PIPELINES, parse_settings, settings_of
from composer.methods.basis import ctm
from composer.methods.join import elect
from composer.methods.matrix import Matrix
from composer.methods.pipeline import Selections, SlotDelta, WeightSlot, combine_slot
from composer.methods.spectral import compress_dense
from tests.composer import dense_methods as dense
from tests.doses import each_value_once

OUTPUTS, INPUTS = 150, 90
RANKS = (4, 6, 3)
WEIGHTS = (1.0, 0.5, -0.7)
OF_WEIGHTS = {name: pipeline for name, pipeline in PIPELINES.items() if not pipeline.fitted}
METHODS = [name for name, pipeline in OF_WEIGHTS.items() if not pipeline.parity and pipeline.calibrate == "none"]
LOSSLESS = {"density": 1.0, "gamma": 0.0}


def low_ranks(seed: int = 0, layout: Layout = Layout.LINEAR) -> list[LowRank]:
    generator = torch.Generator().manual_seed(seed)
    return [
        LowRank(
            module="m",
            weight="m.weight",
            layout=layout,
            A=torch.randn(rank, INPUTS, generator=generator),
            B=torch.randn(OUTPUTS, rank, generator=generator) / rank,
            scale=0.5 + index,
        )
        for index, rank in enumerate(RANKS)
    ]


def known(method: str, wanted: dict[str, object]) -> dict[str, object]:
    """The settings that the method has."""
    return {name: value for name, value in wanted.items() if name in settings_of(method).field_names()}


def combined(
    method: str, deltas: Sequence[Additive], weights: Sequence[float], settings: dict[str, object] | None = None
) -> torch.Tensor:
    """The result of the method, dense and as stored, in float64."""
    parts = [SlotDelta(i, delta, weight, f"{i}") for i, (delta, weight) in enumerate(zip(deltas, weights, strict=True))]
    slot = WeightSlot(parts, sum(weights))
    parsed = parse_settings(method, settings or {})
    added, _ = combine_slot(slot, parsed, Selections.over([slot], parsed))
    return sum((as_stored(delta) for delta in added), torch.zeros(added[0].stored_shape, dtype=torch.float64))


def as_stored(delta: Additive) -> torch.Tensor:
    if isinstance(delta, LowRank):
        left, right = delta.stored_factors()
        return left.double() @ right.double()
    return delta.rows(torch.zeros(delta.stored_shape), 0).double()


def pairs(deltas: Sequence[LowRank]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(delta.B_OR.double() * delta.scale, delta.A_RI.double()) for delta in deltas]


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


References = dict[str, Callable[[list[torch.Tensor], list[tuple[torch.Tensor, torch.Tensor]]], torch.Tensor]]
REFERENCES: References = {
    "stack": lambda X, _: dense.summed(X, WEIGHTS),
    "linear": lambda X, _: dense.summed(X, WEIGHTS),
    "mean": lambda X, _: dense.summed(X, WEIGHTS) / sum(WEIGHTS),
    "svd": lambda X, _: dense.truncated(dense.summed(X, WEIGHTS), max(RANKS)),
    "ties": lambda X, _: dense.elected([dense.trimmed(x, 0.2) for x in X], WEIGHTS),
    "magnitude_prune": lambda X, _: dense.summed([dense.trimmed(x, 0.2) for x in X], WEIGHTS),
    "breadcrumbs": lambda X, _: dense.summed([dense.without_outliers(x, 0.9, 0.01) for x in X], WEIGHTS),
    "breadcrumbs_ties": lambda X, _: dense.elected([dense.without_outliers(x, 0.9, 0.01) for x in X], WEIGHTS),
    "sce": lambda X, _: dense.sce(X, WEIGHTS, 0.1),
    "dare_linear": lambda X, _: dense.summed(_dare(X), WEIGHTS),
    "dare_ties": lambda X, _: dense.elected(_dare(X), WEIGHTS),
    "della": lambda X, _: dense.elected(_della(X), WEIGHTS),
    "della_linear": lambda X, _: dense.summed(_della(X), WEIGHTS),
    "tsv": lambda X, _: dense.tsv(X, WEIGHTS, RANKS),
    "iso": lambda X, _: dense.iso(dense.summed(X, WEIGHTS)),
    "core_tsv": lambda X, _: dense.tsv(X, WEIGHTS, RANKS),
    "core_iso": lambda X, _: dense.iso(dense.summed(X, WEIGHTS)),
    "core_ties": lambda _, pairs: _between(*dense.in_core(pairs, canonical=True), _trimmed),
    "core_dare_ties": lambda _, pairs: _between(*dense.in_core(pairs, canonical=True), _dare),
    "knots_ties": lambda X, _: _in_knots(X, _trimmed),
    "knots_dare_ties": lambda X, _: _in_knots(X, _dare),
    "ctm_mean": lambda X, _: dense.summed(X, WEIGHTS) / sum(WEIGHTS),
    "ctm_ties": lambda X, _: _between(*dense.in_ctm(X, sum(RANKS)), _trimmed),
    "ctm_dare_ties": lambda X, _: _between(*dense.in_ctm(X, sum(RANKS)), _dare),
}
REFERENCES |= {
    f"{name}_svd": (lambda X, pairs, exact=REFERENCES[name]: dense.truncated(exact(X, pairs), max(RANKS)))
    for name in (method.removesuffix("_svd") for method in METHODS if method.endswith("_svd"))
}
Thinned = Callable[[list[torch.Tensor]], list[torch.Tensor]]


def _trimmed(X: list[torch.Tensor]) -> list[torch.Tensor]:
    return [dense.trimmed(x, 0.2) for x in X]


def _dare(X: list[torch.Tensor]) -> list[torch.Tensor]:
    return [dense.dare(x, 0.5, 0, f"{i}") for i, x in enumerate(X)]


def _della(X: list[torch.Tensor]) -> list[torch.Tensor]:
    return [dense.della(x, 0.5, 0.15, 0, f"{i}") for i, x in enumerate(X)]


def _between(P: torch.Tensor, Q: torch.Tensor, X: list[torch.Tensor], thinned: Thinned) -> torch.Tensor:
    return P @ dense.elected(thinned(X), WEIGHTS) @ Q.T


def _in_knots(X: list[torch.Tensor], thinned: Thinned) -> torch.Tensor:
    P, cores = dense.in_knots(X, sum(RANKS))
    return P @ dense.elected(thinned(cores), WEIGHTS)


def test_every_method_has_a_reference() -> None:
    assert REFERENCES.keys() == set(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_its_dense_float64_reference(method: str) -> None:
    deltas = low_ranks()
    own = pairs(deltas)
    settings = known(method, {"ctm_rank": sum(RANKS)})
    expected = REFERENCES[method]([B @ A for B, A in own], own)
    assert error(combined(method, deltas, WEIGHTS, settings), expected) < 2e-5


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("method", ["svd", "ties", "ties_svd", "core_ties", "knots_ties", "tsv"])
def test_a_weight_that_is_stored_transposed_gets_the_transposed_delta(method: str, layout: Layout) -> None:
    settings = known(method, {"density": 1.0})
    plain = combined(method, low_ranks(), WEIGHTS, settings)
    stored = combined(method, low_ranks(layout=layout), WEIGHTS, settings)
    assert error(stored if layout is Layout.LINEAR else stored.T, plain) < 2e-5


def test_votes_and_divisors_of_an_election_are_settings() -> None:
    deltas = low_ranks()
    X = [B @ A for B, A in pairs(deltas)]
    for weights in ((1.0, 0.5, 0.7), (1.0, -0.5, 0.7)):
        for vote in ("plain", "weighted", "count"):
            for divide in ("count", "weights", "none"):
                ours = combined("ties", deltas, weights, {"vote": vote, "divide": divide, "density": 0.5})
                theirs = dense.elected([dense.trimmed(x, 0.5) for x in X], weights, vote, divide)
                assert error(ours, theirs) < 1e-5, (weights, vote, divide)


@pytest.mark.parametrize("method", [name for name in METHODS if "iso" not in name and "della" not in name])
def test_one_adapter_of_weight_one_is_itself_when_nothing_is_dropped(method: str) -> None:
    delta = low_ranks()[0]
    ours = combined(method, [delta], [1.0], known(method, {**LOSSLESS, "rank": delta.rank}))
    assert error(ours, as_stored(delta)) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_adapters_does_not_matter(method: str) -> None:
    parts = [SlotDelta(i, delta, w, f"{i}") for i, (delta, w) in enumerate(zip(low_ranks(), WEIGHTS, strict=True))]
    parsed = parse_settings(method, {})
    results = []
    for order in ((0, 1, 2), (2, 0, 1)):
        slot = WeightSlot([parts[i] for i in order], sum(WEIGHTS))
        added, _ = combine_slot(slot, parsed, Selections())
        results.append(sum(as_stored(delta) for delta in added))
    assert error(results[1], results[0]) < 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_deltas_three_times_as_large_give_a_result_three_times_as_large(method: str) -> None:
    deltas = low_ranks()
    larger = [
        LowRank(
            module=delta.module,
            weight=delta.weight,
            layout=delta.layout,
            A=delta.A_RI,
            B=delta.B_OR,
            scale=3 * delta.scale,
        )
        for delta in deltas
    ]
    assert error(combined(method, larger, WEIGHTS), 3 * combined(method, deltas, WEIGHTS)) < 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_lambda_scales_the_result(method: str) -> None:
    deltas = low_ranks()
    halved = combined(method, deltas, WEIGHTS, {"lambda": 0.5})
    assert error(halved, 0.5 * combined(method, deltas, WEIGHTS)) < 1e-5


def test_the_bases_of_ctm_are_those_that_alternating_converges_to() -> None:
    draw = torch.Generator().manual_seed(2)
    own = [(torch.randn(60, 8, generator=draw).double(), torch.randn(8, 40, generator=draw).double()) for _ in "abc"]
    basis = ctm(own, 8)
    assert basis.P is not None
    assert basis.Q is not None
    deltas, V, P = [B @ A / (B @ A).norm() for B, A in own], basis.Q, basis.P
    U = P
    for _ in range(500):
        U = torch.linalg.svd(torch.cat([D @ V for D in deltas], 1), full_matrices=False)[0][:, :8]
        V = torch.linalg.svd(torch.cat([D.T @ U for D in deltas], 1), full_matrices=False)[0][:, :8]
    assert float((U @ U.T - P @ P.T).norm()) < 1e-3


@pytest.mark.parametrize("method", [name for name, one in PIPELINES.items() if one.calibrate == "pico"])
def test_pico_gives_every_method_the_mean_norm_of_its_inputs_back(method: str) -> None:
    deltas = low_ranks()
    norms = [abs(w) * float((B @ A).norm()) for w, (B, A) in zip(WEIGHTS, pairs(deltas), strict=True)]
    ours = combined(method, deltas, WEIGHTS)
    assert float(ours.norm()) == pytest.approx(sum(norms) / 3, rel=1e-4)


def test_pico_damps_the_output_directions_that_adapters_share() -> None:
    deltas = low_ranks()
    for gauge in ("raw", "canonical"):
        ours = combined("pico_stack", deltas, WEIGHTS, {"gauge": gauge, "restore": "none"})
        damped = [B @ A for B, A in dense.pico(pairs(deltas), canonical=gauge == "canonical")]
        assert error(ours, dense.summed(damped, WEIGHTS)) < 1e-5, gauge


@pytest.mark.parametrize("method", METHODS)
def test_pico_then_a_method_is_that_method_of_the_damped_deltas_at_the_mean_norm(method: str) -> None:
    deltas = low_ranks()
    damped = dense.pico(pairs(deltas), canonical=True)
    expected = REFERENCES[method]([B @ A for B, A in damped], damped)
    norms = [abs(w) * float((B @ A).norm()) for w, (B, A) in zip(WEIGHTS, pairs(deltas), strict=True)]
    expected = expected * (sum(norms) / len(norms) / expected.norm())
    ours = combined(f"pico_{method}", deltas, WEIGHTS, known(method, {"ctm_rank": sum(RANKS)}))
    assert error(ours, expected) < 5e-5


def test_a_compression_reports_the_error_that_it_made() -> None:
    deltas = low_ranks()
    exact = dense.summed([B @ A for B, A in pairs(deltas)], WEIGHTS)
    for method in ("svd", "stack", "ties_svd"):
        parts = [SlotDelta(i, delta, w, f"{i}") for i, (delta, w) in enumerate(zip(deltas, WEIGHTS, strict=True))]
        parsed = parse_settings(method, {"rank": 5, **known(method, {"density": 1.0, "divide": "none"})})
        (made,), lost = combine_slot(WeightSlot(parts, 0.8), parsed, Selections())
        assert lost is not None
        assert isinstance(made, LowRank)
        assert (lost.rank, made.rank) == (5, 5)
        if method != "ties_svd":  # whose dense delta differs from the plain sum
            assert lost.error == pytest.approx(float((as_stored(made) - exact).norm()), rel=1e-4)
            assert lost.error == pytest.approx(float((dense.truncated(exact, 5) - exact).norm()), rel=1e-4)
            assert lost.norm == pytest.approx(float(exact.norm()), rel=1e-5)


def test_compressing_a_large_dense_delta_loses_hardly_more_than_the_best_rank_does() -> None:
    X = torch.randn(1100, 700, generator=torch.Generator().manual_seed(5)) @ torch.diag(0.99 ** torch.arange(700.0))
    (left, right), lost = compress_dense("m", Matrix.of(X), 24, None)
    best = float((dense.truncated(X.double(), 24) - X.double()).norm())
    assert float((left @ right - X).norm()) == pytest.approx(lost.error, rel=1e-4)
    assert best <= lost.error * (1 + 1e-6) <= best * 1.005


def test_a_small_loss_of_a_dense_delta_is_reported_as_well() -> None:
    draw = torch.Generator().manual_seed(5)
    product = torch.randn(600, 16, generator=draw) @ torch.randn(16, 500, generator=draw)
    X = product + torch.randn(600, 500, generator=draw) * 5e-4 * product.std()
    (left, right), lost = compress_dense("m", Matrix.of(X), 16, None)
    assert lost.relative == pytest.approx(float((left.double() @ right.double() - X).norm() / X.norm()), rel=1e-3)
    assert 4e-4 < lost.relative < 6e-4


@pytest.mark.parametrize("method", ["pico_stack", "pico_ties", "pico_knots_ties", "pico_ctm_mean", "ctm_mean"])
@pytest.mark.parametrize("restore", ["merged", "each"])
def test_what_a_cut_loses_is_reported_for_the_sum_also_where_its_norm_is_given_back(method: str, restore: str) -> None:
    parts = [SlotDelta(i, delta, w, f"{i}") for i, (delta, w) in enumerate(zip(low_ranks(), WEIGHTS, strict=True))]
    cut, full = (known(method, {"restore": restore, **more}) for more in ({"rank": 3}, {"ctm_rank": sum(RANKS)}))
    (made,), lost = combine_slot(WeightSlot(parts, 0.8), parse_settings(method, cut), Selections())
    uncut, _ = combine_slot(WeightSlot(parts, 0.8), parse_settings(method, full), Selections())
    exact = sum(as_stored(delta) for delta in uncut)
    assert lost is not None
    assert lost.error == pytest.approx(float((as_stored(made) - exact).norm()), rel=1e-4)
    assert lost.norm == pytest.approx(float(exact.norm()), rel=1e-4)


@pytest.mark.parametrize("method", ["stack", "svd", "ties_svd", "knots_ties"])
def test_a_share_of_the_energy_decides_the_rank(method: str) -> None:
    parts = [SlotDelta(i, delta, w, f"{i}") for i, (delta, w) in enumerate(zip(low_ranks(), WEIGHTS, strict=True))]
    ranks = []
    for energy in (0.5, 0.9, 0.99):
        (made,), lost = combine_slot(WeightSlot(parts, 0.8), parse_settings(method, {"energy": energy}), Selections())
        assert lost is not None
        assert isinstance(made, LowRank)
        assert lost.relative**2 <= 1 - energy + 1e-5
        ranks.append(made.rank)
    assert ranks == sorted(set(ranks)), "more energy takes more directions"


def test_random_masks_depend_on_seed_and_adapter_and_not_on_rows_or_order() -> None:
    deltas = low_ranks()

    def made(seed: int) -> Additive:
        parts = [SlotDelta(i, delta, w, f"{i}") for i, (delta, w) in enumerate(zip(deltas, WEIGHTS, strict=True))]
        (added,), _ = combine_slot(WeightSlot(parts, 0.8), parse_settings("dare_ties", {"seed": seed}), Selections())
        return added

    one = made(1)
    full = as_stored(one)
    assert not isinstance(one, LowRank)
    pieces = [one.rows(torch.zeros(end - begin, INPUTS), begin) for begin, end in ((0, 7), (7, 100), (100, OUTPUTS))]
    assert torch.equal(torch.cat(pieces).double(), full)
    assert torch.equal(as_stored(made(1)), full)
    assert not torch.equal(as_stored(made(2)), full)


@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_what_is_dropped_at_random_is_made_up_for_on_average(method: str) -> None:
    delta = low_ranks()[0]
    settings = [{"seed": seed, "density": 0.5} for seed in range(60)]
    mean = torch.stack([combined(method, [delta], [1.0], setting) for setting in settings]).mean(0)
    assert error(mean, as_stored(delta)) < 0.2  # sqrt((1 - p) / p / 60) is 0.13 where p is 0.5


def test_ties_over_the_whole_model_trims_the_smaller_module_more() -> None:
    small, large = low_ranks(1), low_ranks(2)
    small = [
        LowRank(module="s", weight="s.weight", layout=d.layout, A=d.A_RI, B=d.B_OR, scale=d.scale / 10) for d in small
    ]
    slots = [
        WeightSlot([SlotDelta(i, delta, 1.0, f"{i}") for i, delta in enumerate(deltas)], 3.0)
        for deltas in (small, large)
    ]
    parsed = parse_settings("magnitude_prune", {"scope": "model", "density": 0.2})
    selections = Selections.over(slots, parsed)
    kept = [int(as_stored(combine_slot(slot, parsed, selections)[0][0]).count_nonzero()) for slot in slots]
    assert kept[0] < kept[1] / 10
    with pytest.raises(ComposerError, match="scope"):
        Selections.over(slots, parse_settings("core_ties", {"scope": "model"}))


def test_equal_magnitudes_are_kept_in_the_order_of_their_places() -> None:
    A, B = torch.ones(1, 90), torch.ones(150, 1)
    delta = LowRank(module="m", weight="m.weight", layout=Layout.LINEAR, A=A, B=B, scale=1.0)
    kept = combined("magnitude_prune", [delta], [1.0], {"density": 0.3}).flatten()
    assert int(kept.count_nonzero()) == int(0.3 * 150 * 90)
    assert bool(kept[: int(0.3 * 150 * 90)].all())


def test_the_subspaces_of_adapters_that_share_them_are_found_by_ctm() -> None:
    generator = torch.Generator().manual_seed(3)
    B, A = torch.randn(OUTPUTS, 4, generator=generator), torch.randn(4, INPUTS, generator=generator)
    mixes = [torch.randn(4, 4, generator=generator) for _ in range(3)]
    deltas = [LowRank(module="m", weight="m.weight", layout=Layout.LINEAR, A=A, B=B @ mix, scale=1.0) for mix in mixes]
    exact = sum(as_stored(delta) for delta in deltas) / 3
    assert error(combined("ctm_mean", deltas, [1.0] * 3, {"ctm_rank": 4}), exact) < 1e-5


@pytest.mark.parametrize("method", ["stack", "mean", "svd"])
def test_a_delta_without_factors_is_cut_to_a_rank_like_any_other(method: str) -> None:
    deltas = low_ranks()
    dense_one = as_stored(deltas[1]).float()
    computed = RowwiseDelta(
        module="m",
        weight="m.weight",
        stored_shape=(OUTPUTS, INPUTS),
        rows=lambda W, begin: dense_one[begin : begin + W.shape[0]].to(W),
    )
    mixed = combined(method, [deltas[0], computed, deltas[2]], WEIGHTS, {"rank": 5})
    assert error(mixed, combined(method, deltas, WEIGHTS, {"rank": 5})) < 1e-3


@pytest.mark.parametrize(
    ("method", "zeros", "budget"),
    each_value_once(
        (name for name, pipeline in PIPELINES.items() if not pipeline.parity),
        [1, 3],
        [{}, {"rank": 4}, {"energy": 0.9}],
    ),
)
def test_adapters_that_were_never_trained_add_nothing_and_break_nothing(
    method: str, zeros: int, budget: dict[str, object]
) -> None:
    deltas = [
        replace(low_rank, B=torch.zeros_like(low_rank.B_OR)) if index < zeros else low_rank
        for index, low_rank in enumerate(low_ranks())
    ]
    ours = combined(method, deltas, WEIGHTS, budget)
    assert bool(ours.isfinite().all())
    if zeros == 3:
        assert not bool(ours.any())


@pytest.mark.parametrize("method", METHODS)
def test_factors_in_the_files_own_dtype_give_the_result_of_their_float32_values(method: str) -> None:
    halves = [replace(low_rank, A=low_rank.A_RI.bfloat16(), B=low_rank.B_OR.half()) for low_rank in low_ranks()]
    wide = [replace(halve, A=halve.A_RI.float(), B=halve.B_OR.float()) for halve in halves]
    assert torch.equal(combined(method, halves, WEIGHTS), combined(method, wide, WEIGHTS))


def test_an_election_divides_by_what_it_keeps_however_large_or_small_the_weights_are() -> None:
    X_TMN = torch.tensor([[[1.0, 0.0, 4.0]], [[3.0, 2.0, -1.0]]])
    assert elect(X_TMN, [2000.0, 2000.0], divide="count").tolist() == [[4000.0, 4000.0, 8000.0]]
    assert elect(X_TMN, [1.0, 0.0005], divide="weights").tolist() == [[pytest.approx(1.001, abs=1e-4), 2.0, 4.0]]


@pytest.mark.parametrize(
    ("weights", "divide", "by_mergekit"),
    [
        ((1.0, -0.5, 0.75), "none", [-1.75, 3.0, 5.0, 2.75, -3.5, -2.5]),
        ((1.0, -0.5, 0.75), "weights", [-7.0, 4.0, 4.0, 2.2, -14.0, -5.0]),
        ((1.0, 0.5, 0.75), "none", [2.0, 3.5, 4.5, -1.5, 2.0, -1.5]),
        ((-1.0, -0.5, -0.75), "weights", [4 / 3, 2.8, 18 / 7, -3.0, 4.0, -1.5]),
        ((1.0, -1.0, 0.5), "weights", [5.0, -3.0, 10.0, 8.0, 10.0, -3.5]),
    ],
)
def test_a_weighted_vote_is_the_ties_of_mergekit_for_weights_of_either_sign(
    weights: tuple[float, ...], divide: str, by_mergekit: list[float]
) -> None:
    """`by_mergekit` is what mergekit 0.1.5 returns for `ties` with density 1 (normalize: true for `weights`)."""
    rows = ([1.0, -2.0, 3.0, 0.5, 0.0, -1.5], [2.0, 1.0, -1.0, -3.0, 4.0, 2.0], [-1.0, 4.0, 2.0, 1.0, -2.0, 0.25])
    X_TMN = torch.tensor([[row] for row in rows])
    assert elect(X_TMN, weights, "weighted", divide)[0].tolist() == pytest.approx(by_mergekit, abs=1e-6)
    # The count of the kept deltas is a divisor that mergekit lacks: a negative weight is the opposite adapter.
    opposite = X_TMN * torch.tensor(weights).sign()[:, None, None]
    assert torch.equal(
        elect(X_TMN, weights, "weighted", "count"), elect(opposite, [abs(w) for w in weights], "weighted", "count")
    )


def test_only_weighted_votes_have_a_new_version() -> None:
    """Results of the other votes did not change, and their locks keep their digests."""
    versions = {vote: parse_settings("ties", {"vote": vote}).version for vote in ("plain", "count", "weighted")}
    assert versions == {"plain": 1, "count": 1, "weighted": 2}
    assert parse_settings("pico_core_ties", {"vote": "weighted"}).version == 3


def test_weights_that_cancel_are_no_divisor() -> None:
    X_TMN = torch.tensor([[[1.0, 1.0]], [[3.0, 0.0]]])
    assert elect(X_TMN, [1.0, -1.0], divide="weights").tolist() == [[-2.0, 1.0]]
