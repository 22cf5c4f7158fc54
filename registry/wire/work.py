"""Documents of compositions, jobs and audit rows."""

from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, NotRequired, TypedDict, cast

from pydantic import Field

from composer.formats.scores import ScoreDocument
from registry.formats.audit_chain import AuditContent
from registry.formats.priority import Priority
from registry.wire.catalog import BaseRef
from registry.wire.document import MAX_INT64, Wire, WireIn

if TYPE_CHECKING:
    from composer.formats.recipes.lock import LockDocument

MAX_CHECKED = 16
"""The most adapters in one conflict check, which every reader may request."""


class WishIn(WireIn):
    """The instruction to a worker about a job."""

    priority: Priority = Field(
        default=Priority.NORMAL,
        description="Which of otherwise equal jobs runs first. `high` needs the role releaser in the "
        "job's namespace, or in the whole registry if it has none.",
    )
    memory_bytes: int | None = Field(
        default=None,
        ge=0,
        le=MAX_INT64,
        description="Memory of a device that the job takes; by default the size of its largest base, if it is loaded.",
    )


class PriorityIn(WireIn):
    priority: Priority


class CompositionIn(WishIn):
    """`recipe` is described in composer/formats/recipes/recipe.py."""

    recipe: dict[str, Any]
    plan: bool = Field(default=False, description="Resolve, lock and check; change nothing.")


class StepOut(Wire):
    """`done` and `total` count `unit`: examples, bytes or units; all three are null if a step has no such amount.
    `redone` units ran again after a failure. In a single job, `log` has the last lines of one that failed."""

    name: str
    state: str
    progress: float
    done: int | None = None
    total: int | None = None
    unit: str | None = None
    redone: int = 0
    log: list[str] = Field(default=[])


class ResultRow(Wire):
    repository: str
    version: str
    commit: str

    @property
    def name(self) -> str:
        """`acme/sql:1.0.0`"""
        return f"{self.repository}:{self.version}"


class MeasuredValue(TypedDict):
    """A score over `n` examples."""

    value: float
    stderr: float | None
    n: int


class InputScore(MeasuredValue):
    """The score of an input. Older compositions do not record whether the suite is the input's own, nor whether the
    score was recorded before."""

    repository: str
    version: str
    recorded: NotRequired[bool]
    own_suite: NotRequired[bool]


class RewordedAnswers(TypedDict):
    """The answers that an input gives alone to reworded prompts of its suite, and those of them that are left."""

    answered: int
    still_answered: int


class CandidateScore(ScoreDocument):
    """A score of a composition's result, with those of its inputs and of the base on the same examples. `phrase` was
    before each prompt. `reworded` is stated for accuracy on the own suite of an input, if that is a chat and no search
    has measured it."""

    phrase: NotRequired[str]
    inputs: NotRequired[list[InputScore]]
    base: NotRequired[MeasuredValue]
    reworded: NotRequired[RewordedAnswers]


class CompositionOut(Wire):
    """A composition or its plan. `result` is the first of `results`: the release of the combined adapter, or else that
    of the model."""

    id: int
    job: int
    state: str
    plan: bool
    recipe: dict[str, Any]
    lock: dict[str, Any]
    conflicts: dict[str, Any] | None
    candidate_scores: list[dict[str, Any]] | None
    gates: list[dict[str, Any]] | None
    merge: dict[str, Any] | None
    result: ResultRow | None
    results: list[ResultRow]
    steps: list[StepOut]
    error: dict[str, Any] | None

    @property
    def locked(self) -> "LockDocument":
        """The lock, whose earlier versions lack some parts."""
        return cast("LockDocument", self.lock)

    @property
    def verdict(self) -> str | None:
        """The verdict of the conflict check; None before the check."""
        return self.conflicts["verdict"] if self.conflicts else None

    @property
    def published(self) -> tuple[str, ...]:
        """The releases that the composition published."""
        return tuple(row.name for row in self.results)


def candidate_scores(composition: CompositionOut) -> list[CandidateScore]:
    """The scores of a composition's result; empty before they are measured."""
    return cast("list[CandidateScore]", composition.candidate_scores or [])


class ConflictInput(WireIn):
    """An adapter by reference. `rules` set different weights for some layers or modules, as in a recipe."""

    adapter: str = Field(min_length=1, max_length=300)
    weight: float = Field(default=1.0, allow_inf_nan=False)
    rules: list[dict[str, Any]] = Field(default=[], max_length=100)


class ConflictsIn(WireIn):
    """A combination to check, written as in a recipe."""

    inputs: list[ConflictInput] = Field(min_length=2, max_length=MAX_CHECKED)
    method: str = Field(default="stack", max_length=100)
    settings: dict[str, Any] = Field(default={}, description="Settings of the method.")


class CheckedInput(Wire):
    repository: str
    version: str
    commit: str
    weight: float
    rules: list[dict[str, Any]] = Field(default=[])


class ConflictsOut(Wire):
    """`state`, `steps` and `error` are those of the job that computes the report. `report` is null until the job is
    done, and equals the document of `adaptory conflicts --json` without measurements."""

    id: int
    job: int
    state: str
    base: BaseRef
    inputs: list[CheckedInput]
    method: str
    settings: dict[str, Any]
    report: dict[str, Any] | None
    steps: list[StepOut]
    error: dict[str, Any] | None


class JobOut(Wire):
    """`heartbeat_at` is the worker's last sign of life while the job runs, and for a queued job the time when it is
    due. `needs` are what its worker must have: `base:DIGEST`, `scorer:NAME`, `harness` or `evolution`, and
    `memory_bytes` of a device; null until a worker has determined them. `waits_for` names what a queued job waits for.
    `stalled_since` is set while the job runs and its worker has been silent for a minute; the next worker continues
    it."""

    id: int
    kind: str
    namespace: str | None
    state: str
    cancel_requested: bool
    heartbeat_at: datetime | None
    steps: list[StepOut]
    error: dict[str, Any] | None
    created_at: datetime
    created_by: str
    finished_at: datetime | None
    priority: Priority
    needs: list[str]
    memory_bytes: int | None
    waits_for: str | None
    stalled_since: datetime | None


class UpgradeIn(WireIn):
    """Two bases, each by digest, name or alias. Without `suites`, each adapter is measured on those that it has scores
    on."""

    old: str = Field(min_length=1, max_length=200)
    new: str = Field(min_length=1, max_length=200)
    suites: list[Annotated[str, Field(max_length=64)]] = Field(default=[], max_length=50)
    evaluate: bool = Field(default=True, description="Measure the adapters that fit; otherwise only list.")


class UpgradeScore(Wire):
    """A score on the new base, and those on the old base and of the new base alone; null if not recorded. `gain` is
    positive if the new score is better than the old one."""

    suite: str
    metric: str
    n: int
    old: float | None
    new: float
    base: float | None
    gain: float | None


class UpgradeAdapter(Wire):
    """`why` states why it does not fit the new base; `errors` are those of its measurement."""

    repository: str
    version: str
    channels: list[str]
    fits: bool
    why: str
    scores: list[UpgradeScore]
    errors: list[str]


class UpgradeOut(Wire):
    """`job` measures the adapters that fit, null if there is nothing to measure; `state` and `error` are its own."""

    old: BaseRef
    new: BaseRef
    job: int | None
    state: str | None
    error: dict[str, Any] | None
    adapters: list[UpgradeAdapter]


class EvaluationIn(WishIn):
    """A measurement for a worker: releases by reference, bases by digest, name or alias, on suites by name,
    `NAME@VERSION` or digest. At most 1,000 pairs."""

    releases: list[Annotated[str, Field(min_length=1, max_length=300)]] = Field(default=[], max_length=100)
    bases: list[Annotated[str, Field(min_length=1, max_length=200)]] = Field(default=[], max_length=100)
    suites: list[Annotated[str, Field(min_length=1, max_length=150)]] = Field(min_length=1, max_length=50)


class EvaluatedScore(Wire):
    metric: str
    value: float
    stderr: float | None
    n: int
    higher_is_better: bool


class EvaluatedPair(Wire):
    """A release, or with null `repository` and `version` a base alone, on a suite. `scores` is null until it is
    measured; `error` is why that failed. Scores are recorded once the job has measured everything."""

    repository: str | None
    version: str | None
    base: BaseRef
    suite: str
    suite_digest: str
    task: str
    scores: list[EvaluatedScore] | None
    error: str | None


class EvaluationOut(Wire):
    """`state`, `steps` and `error` are those of the job."""

    job: int
    state: str
    steps: list[StepOut]
    error: dict[str, Any] | None
    items: list[EvaluatedPair]


class AuditOut(Wire):
    """`before` and `after` describe the change; `source` is the caller's address and client."""

    id: int
    at: datetime
    actor: str
    token: str | None
    source: str | None
    act: str
    subject: str
    namespace: str | None
    reason: str | None
    before: dict[str, Any] | None
    after: dict[str, Any] | None
    detail: dict[str, Any]

    @property
    def content(self) -> AuditContent:
        """The row as its seal stands for it."""
        return AuditContent(
            id=self.id,
            at=self.at,
            actor=self.actor,
            token=self.token,
            source=self.source,
            act=self.act,
            subject=self.subject,
            namespace=self.namespace,
            reason=self.reason,
            before=self.before,
            after=self.after,
            detail=self.detail,
        )


class SealedAuditOut(Wire):
    """A link of the audit log's hash chain: the row `id`, the digest of its content when it was sealed, the chain's
    digest up to it, and the row as it is now, null if it was deleted. `removal` is the id of the row that records the
    removal of a user which rewrote this one."""

    number: int
    id: int
    content: str
    removal: int | None
    digest: str
    row: AuditOut | None


class CheckpointOut(Wire):
    """The digest of the audit log up to the row `number` of its chain; 0 for an empty log."""

    number: int
    digest: str
    at: datetime
