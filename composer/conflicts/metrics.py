"""The numbers of a conflict report: for a pair, for an adapter and for the whole set, from sums over modules."""

from dataclasses import asdict, dataclass, fields

from composer.deltas.lowrank import PairSums, Relations


@dataclass(frozen=True, slots=True, kw_only=True)
class PairMetrics:
    """Relations between two deltas a and b in one module, in one layer or, from summed terms, in the whole model.

    Overlaps are shares of energy inside the other's span, averaged over both directions; *_excess has chance removed;
    *_ab is the share of a inside b. *_alignment is the cosine of Delta Delta^T (outputs) or Delta^T Delta (inputs).
    `norm_*` are Frobenius norms without weights. `dominance` is the larger one's share of the weighted energy, 0.5 to
    1. `interference` is 1 for orthogonal deltas, up to 2 for equal ones, down to 0 for opposite ones. `retention_a` is
    how much of a is in the weighted sum M, <M, a> / |a|^2. `crowding` is Pico's c_max, of U sqrt(S). `sign_conflict` is
    the share of sampled entries with different signs, `sign_excess` its part beyond arccos(cosine) / pi, and
    `sign_weighted` weights the entries by size.
    """

    cosine: float
    input_overlap: float
    input_excess: float
    input_overlap_ab: float
    input_overlap_ba: float
    output_overlap: float
    output_excess: float
    output_overlap_ab: float
    output_overlap_ba: float
    input_alignment: float
    output_alignment: float
    norm_a: float
    norm_b: float
    dominance: float
    interference: float
    retention_a: float
    retention_b: float
    crowding: float
    sign_conflict: float
    sign_excess: float
    sign_weighted: float

    @classmethod
    def of(cls, sums: PairSums) -> "PairMetrics":
        """The numbers from the sums of two adapters."""

        def mean(both: tuple[float, float]) -> float:
            return sum(both) / 2

        input_overlap = (sums.input_overlap(0, 1), sums.input_overlap(1, 0))
        output_overlap = (sums.output_overlap(0, 1), sums.output_overlap(1, 0))
        return cls(
            cosine=sums.cosine(0, 1),
            input_overlap=mean(input_overlap),
            input_excess=mean((sums.input_excess(0, 1), sums.input_excess(1, 0))),
            input_overlap_ab=input_overlap[0],
            input_overlap_ba=input_overlap[1],
            output_overlap=mean(output_overlap),
            output_excess=mean((sums.output_excess(0, 1), sums.output_excess(1, 0))),
            output_overlap_ab=output_overlap[0],
            output_overlap_ba=output_overlap[1],
            input_alignment=sums.input_alignment(0, 1),
            output_alignment=sums.output_alignment(0, 1),
            norm_a=sums.norm(0),
            norm_b=sums.norm(1),
            dominance=max(sums.shares()),
            interference=sums.interference(),
            retention_a=sums.retention(0),
            retention_b=sums.retention(1),
            crowding=sums.crowding(0, 1),
            sign_conflict=sums.sign_conflict(0, 1),
            sign_excess=sums.sign_excess(0, 1),
            sign_weighted=sums.sign_weighted(0, 1),
        )

    @property
    def weighted_cosine(self) -> float:
        """The cosine of w_a a and w_b b: negated if the weights differ in sign, 0 if either is zero."""
        apart = self.dominance * (1 - self.dominance)
        return min(1.0, max(-1.0, (self.interference - 1) / (2 * apart**0.5))) if apart > 0 else 0.0

    def to_json(self) -> dict[str, float]:
        return {field.name: rounded_for_json(getattr(self, field.name)) for field in fields(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaSize:
    """The size of one delta: |Delta|_F, the largest sigma_1, and |Delta|_F^2 / sigma_1^2 (for several modules, the
    quotient of the sums). With a base, also w |Delta|_F / |W|_F and the largest w sigma_1(Delta) / sigma_1(W) of the
    weights examined. Above 1, the delta replaces the weight or its strongest direction rather than adapting it.
    """

    norm: float
    spectral_norm: float
    stable_rank: float
    amplification: float | None = None
    spectral_amplification: float | None = None

    @classmethod
    def of(
        cls, compared: Relations, index: int, base_energy: float | None, base_sigma: float | None = None
    ) -> "DeltaSize":
        """The size in one module, or in several (without `sigma`)."""
        sums = compared.sums
        weighted = max(0.0, float(sums.weighted[index, index]))
        return cls(
            norm=sums.norm(index),
            spectral_norm=float(compared.sigmas[index]),
            stable_rank=sums.stable_rank(index),
            amplification=(weighted / base_energy) ** 0.5 if base_energy else None,
            spectral_amplification=compared.weighted_sigmas[index] / base_sigma if base_sigma else None,
        )

    def to_json(self) -> dict[str, float | None]:
        return {name: None if value is None else rounded_for_json(value) for name, value in asdict(self).items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class SetMetrics:
    """The weighted sum M of all adapters: |M|_F, the largest sigma_1, |M|^2 over the sum of squares, and the largest
    crowding.

    With a base, also the share of sampled entries of M that rounding to the base's dtype loses.
    """

    norm: float
    spectral_norm: float
    interference: float
    crowding: float
    lost_share: float | None = None

    @classmethod
    def of(cls, compared: Relations, lost_share: float | None) -> "SetMetrics":
        """The metrics of all adapters together, from their pairwise sums."""
        return cls(
            norm=max(0.0, float(compared.sums.weighted.sum())) ** 0.5,
            spectral_norm=compared.spectral_norm,
            interference=compared.sums.interference(),
            crowding=compared.crowding,
            lost_share=lost_share,
        )

    def to_json(self) -> dict[str, float | None]:
        return {name: None if value is None else rounded_for_json(value) for name, value in asdict(self).items()}


def rounded_for_json(value: float) -> float:
    """The value with six digits, because a report has tens of thousands of numbers."""
    return float(f"{value:.6g}")
