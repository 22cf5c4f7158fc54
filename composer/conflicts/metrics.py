"""The numbers of a conflict report: for a pair and for the set, from sums over modules."""

from dataclasses import asdict, dataclass, fields

from composer.deltas.lowrank import PairSums


@dataclass(frozen=True, slots=True, kw_only=True)
class PairMetrics:
    """Relations between two deltas a and b in one module, in one layer or, from summed terms, in the whole model.

    Overlaps are shares of energy inside the other's span, averaged over both directions; *_excess has chance removed;
    *_ab is the share of a inside b. `dominance` is the larger one's share of the weighted energy, 0.5 to 1.
    `interference` is 1 for orthogonal deltas, up to 2 for equal ones, down to 0 for opposite ones. `retention_a` is how
    much of a is in the weighted sum M, <M, a> / |a|^2.
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
    dominance: float
    interference: float
    retention_a: float
    retention_b: float

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
            dominance=max(sums.shares()),
            interference=sums.interference(),
            retention_a=sums.retention(0),
            retention_b=sums.retention(1),
        )

    @property
    def weighted_cosine(self) -> float:
        """The cosine of w_a a and w_b b: negated if the weights differ in sign, 0 if either is zero."""
        apart = self.dominance * (1 - self.dominance)
        return min(1.0, max(-1.0, (self.interference - 1) / (2 * apart**0.5))) if apart > 0 else 0.0

    def to_json(self) -> dict[str, float]:
        return {field.name: rounded_for_json(getattr(self, field.name)) for field in fields(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class SetMetrics:
    """The weighted sum M of all adapters: |M|^2 over the sum of squares. With a base, also the share of sampled entries
    of M that rounding to the base's dtype loses."""

    interference: float
    lost_share: float | None = None

    def to_json(self) -> dict[str, float | None]:
        return {name: None if value is None else rounded_for_json(value) for name, value in asdict(self).items()}


def rounded_for_json(value: float) -> float:
    """The value with six digits, because a report has tens of thousands of numbers."""
    return float(f"{value:.6g}")
