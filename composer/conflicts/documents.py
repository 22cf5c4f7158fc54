"""The JSON of a conflict report as types. Reports are stored: what an earlier schema lacks is not required."""

from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict


class IntervalDocument(TypedDict):
    """The ends of an interval."""

    low: float
    high: float


class EffectDocument(TypedDict):
    """An `Effect` on a member. `verdict`, `tolerated` and `answers_required` are there if it was judged."""

    member: str
    suite: str
    base: NotRequired[float]
    alone: NotRequired[float]
    combined: NotRequired[float]
    loss: float
    loss_stderr: NotRequired[float | None]
    loss_interval: IntervalDocument | None
    kept: float | None
    answered: int
    still_answered: int
    examples: NotRequired[int]
    alone_weighted: NotRequired[float | None]
    answers_interval: NotRequired[IntervalDocument | None]
    verdict: NotRequired[str]
    tolerated: NotRequired[float | None]
    answers_required: NotRequired[float]


class GuardDocument(TypedDict):
    """A `SideEffect` on a guard. `verdict` and `tolerated` are there if it was judged."""

    suite: str
    base: float
    alone: NotRequired[Mapping[str, float]]
    combined: float
    cost: NotRequired[float]
    rise: float
    rise_stderr: NotRequired[float | None]
    rise_interval: IntervalDocument | None
    examples: NotRequired[int]
    verdict: NotRequired[str]
    tolerated: NotRequired[float | None]


class ProbeDocument(TypedDict):
    """The `Outcome` of a measured combination."""

    k: int
    effects: Sequence[EffectDocument]
    guards: Sequence[GuardDocument]


class CauseDocument(TypedDict):
    """A module where two adapters meet, with its share."""

    module: str
    share: float


class PairDocument(TypedDict):
    """A `Pair`. Each of its modules has the measures of the maps by their names."""

    a: str
    b: str
    modules: Sequence[Mapping[str, Any]]
    verdict: NotRequired[str]
    risk: NotRequired[float | None]
    risk_unit: NotRequired[str | None]
    risk_low: NotRequired[float | None]
    risk_high: NotRequired[float | None]
    evidence: NotRequired[str]
    meaning: NotRequired[str]
    causes: NotRequired[Sequence[CauseDocument]]
    advice: NotRequired[Sequence[str]]
    probe: NotRequired[ProbeDocument | None]


class ModuleDocument(TypedDict):
    """A module of an adapter."""

    module: str


class MemberDocument(TypedDict):
    """A `ComparedAdapter`."""

    name: str
    modules: Sequence[ModuleDocument]


class SetDocument(TypedDict):
    """The set of all adapters together."""

    probe: NotRequired[ProbeDocument | None]
    advice: NotRequired[Sequence[str]]
    kept_words: NotRequired[str]


class SummaryDocument(TypedDict):
    """The verdict in a sentence, the lines that support it, and the fix; empty if there is none."""

    headline: str
    lines: Sequence[str]
    fix: NotRequired[str]


class FindingDocument(TypedDict):
    """A `Finding`."""

    code: str
    severity: str
    subject: str
    message: str
    measure: NotRequired[float | None]


_Together = TypedDict("_Together", {"whole": SetDocument})  # noqa: UP013  (the key is older than the word for it)


class ReportDocument(_Together):
    """A `ConflictReport`, with its summary."""

    verdict: str
    adapters: Sequence[MemberDocument]
    pairs: Sequence[PairDocument]
    findings: Sequence[FindingDocument]
    schema: NotRequired[int]
    summary: NotRequired[SummaryDocument]
    activations: NotRequired[Mapping[str, Any] | None]
