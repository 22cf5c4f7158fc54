"""Records how much a combination adds: finds inputs that add nothing, and inputs that cancel."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import isinf

from composer.deltas.delta import NOTHING, Delta, LowRank
from composer.deltas.lowrank import Grams
from composer.findings import Finding, Severity, zero_deltas
from composer.formats.recipes.methods import MethodSettings
from composer.methods.pipeline import SlotDelta, WeightSlot, cancelled

_MOST_RESTORED = 10.0
"""Pico may restore the norm of a sum by this factor without a finding. Inputs that do not cancel need about 1."""

_CANCELS = 1e-12
"""Relative to the sum of absolute products: a squared norm of at most this is rounding in float64."""


@dataclass(frozen=True, slots=True)
class Tally:
    """Records what each input adds, and how far inputs cancel. Filled slot by slot, from any number of threads. The
    method
    multiplies its result by `factor`."""

    factor: float
    touched: dict[int, list[str]] = field(default_factory=lambda: defaultdict[int, list[str]](list))
    zero: dict[int, list[str]] = field(default_factory=lambda: defaultdict[int, list[str]](list))
    cancelled: dict[str, float] = field(default_factory=dict[str, float])

    def see(self, parts: Iterable[SlotDelta]) -> None:
        """Counts the modules that each adapter changes, and those where its weighted delta vanishes."""
        for part in parts:
            self.touched[part.adapter].append(part.delta.module)
            if isinstance(part.delta, LowRank) and _vanishes(part.delta, part.weight * self.factor):
                self.zero[part.adapter].append(part.delta.module)

    def see_prepared(self, slot: WeightSlot, settings: MethodSettings) -> None:
        """Records how far the prepared deltas of a slot cancel."""
        self.cancelled[slot.module] = cancelled(slot, settings)

    def findings(self, names: Sequence[str]) -> list[Finding]:
        """The findings: zero_delta or zero_modules for an adapter, cancelled and restored_norm for the combination."""
        nothing = [
            finding
            for adapter, touched in sorted(self.touched.items())
            for finding in zero_deltas(names[adapter], self.zero[adapter], len(touched))
        ]
        return nothing + self._of_cancelled()

    def _of_cancelled(self) -> list[Finding]:
        gone = sorted(module for module, factor in self.cancelled.items() if isinf(factor))
        large = {
            module: ratio for module, ratio in self.cancelled.items() if ratio > _MOST_RESTORED and not isinf(ratio)
        }
        findings: list[Finding] = []
        if gone:
            message = f"The inputs cancel in {len(gone)} modules, {gone[0]} first: nothing is added there."
            findings.append(Finding("cancelled", Severity.WARNING, gone[0], message, float(len(gone))))
        if large:
            worst = max(large, key=lambda module: large[module])
            message = (
                f"The inputs nearly cancel in {len(large)} modules: Pico multiplies the remainder of {worst} by "
                f"{large[worst]:.3g}. Change a weight, or set restore=none."
            )
            findings.append(Finding("restored_norm", Severity.WARNING, worst, message, large[worst]))
        return findings


def adds_nothing(deltas: Sequence[Delta]) -> bool:
    """Whether the deltas of every weight add up to zero, beyond the rounding of their factors. Stops at the first one
    that does not. False for deltas without factors, whose entries are computed when they are added."""
    slots: dict[tuple[str, int], list[LowRank]] = defaultdict(list)
    for delta in deltas:
        if not isinstance(delta, LowRank):
            return False
        slots[delta.weight, delta.begin].append(delta)
    return bool(slots) and all(map(_add_up_to_nothing, slots.values()))


def _add_up_to_nothing(deltas: Sequence[LowRank]) -> bool:
    grams = Grams.of(deltas)
    products_RR = grams.outputs * grams.inputs
    return float(products_RR.sum()) <= _CANCELS * float(products_RR.abs().sum())


def _vanishes(delta: LowRank, factor: float) -> bool:
    """Whether no entry of the delta, times the factor, reaches `NOTHING`."""
    largest = [float(matrix.abs().amax()) if matrix.numel() else 0.0 for matrix in (delta.B_OR, delta.A_RI)]
    return abs(factor * delta.scale) * largest[0] * largest[1] * delta.rank < NOTHING
