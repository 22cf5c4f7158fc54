"""Documents of suites, scores, channels, moves and gates."""

from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import AwareDatetime, Field, model_validator

from composer.formats.untrusted import MAX_EXAMPLES
from registry.wire.document import MAX_INT32, Wire, WireIn

MAX_ANSWER_CHARS, MAX_FOLLOWED = 2_000, 100
MAX_NATS = 1e100
"""More than any model has, yet small enough for sums and squares to stay finite."""


class ScoreOut(Wire):
    """`n` is 0 if a reported score does not state it. `source` is the harness that measured it, with its version, or
    the file that reports it; null for the evaluations of this registry. `measured_by` is the worker that measured and
    attested it; without one, `stated_by` is the user who recorded it. `phrase` was before each prompt."""

    suite: str
    suite_digest: str
    kind: Literal["target", "guard"]
    task: str
    metric: str
    value: float
    stderr: float | None
    n: int
    higher_is_better: bool
    reported: bool
    source: str | None
    measured: datetime
    measured_by: str | None = None
    stated_by: str | None = None
    phrase: str | None = None


class ScoreIn(Wire):
    suite_digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    metric: str = Field(pattern=r"^[a-z_][a-z0-9_]{0,63}$")
    value: float = Field(allow_inf_nan=False)
    stderr: float | None = Field(default=None, allow_inf_nan=False, ge=0)
    n: int = Field(ge=1, le=MAX_INT32)
    higher_is_better: bool
    reported: bool = Field(
        default=False, description="Reported by someone, not measured by an evaluation on the suite."
    )
    source: str | None = Field(default=None, min_length=1, max_length=300, description="What measured or reports it.")


class ExampleResult(Wire):
    """One example: nats and tokens of the reference completion, the score of the answer from 0 to 1, and the generated
    or chosen answer; `cut` if it reached the limit of tokens. A harness reports no nats and tokens."""

    nats: float | None = Field(default=None, allow_inf_nan=False, ge=0, le=MAX_NATS)
    tokens: int | None = Field(default=None, ge=1, le=MAX_INT32)
    score: float = Field(ge=0, le=1)
    answer: str | None = Field(default=None, max_length=MAX_ANSWER_CHARS)
    cut: bool = False


class SuiteResults(Wire):
    """The results of all examples of a suite, in its order. The mean of their scores is `metric`."""

    suite_digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    metric: str = Field(default="accuracy", pattern=r"^[a-z_][a-z0-9_]{0,63}$")
    examples: list[ExampleResult] = Field(min_length=1, max_length=MAX_EXAMPLES)


class SuiteResultsOut(SuiteResults):
    suite: str


class ScoresIn(WireIn):
    """`results` are the results behind the suites' scores; optional."""

    scores: list[ScoreIn] = Field(min_length=1, max_length=1000)
    results: list[SuiteResults] = Field(default=[], max_length=1000)


class ScoresOut(Wire):
    scores: list[ScoreOut]


class ScoresImported(Wire):
    """The reported scores that were recorded, and a warning for each one that was not."""

    scores: list[ScoreOut]
    warnings: list[dict[str, Any]]


class SuiteSharedIn(WireIn):
    shared: bool


class SuiteOut(Wire):
    """`namespace` is null for a suite that is for all; one of a namespace is `shared` with all, or for those who may
    read there. `metrics` are those whose better direction the suite's file states; `content` has the examples."""

    name: str
    namespace: str | None = None
    shared: bool = True
    digest: str
    version: str | None
    kind: str
    task: str
    examples: int
    current: bool
    metrics: dict[str, Literal["higher", "lower"]]
    created_at: datetime
    created_by: str
    content: dict[str, Any] | None = None


class ChannelOut(Wire):
    """`move` is the id of the last move. `version` is what the channel serves, null if every candidate is yanked;
    `passes_over` is the version of the last move, if that is yanked and not served; `yanked` if it is yanked but still
    served, since the channel's policy keeps it until the next move."""

    repository: str
    channel: str
    version: str | None
    commit: str | None
    passes_over: str | None = None
    yanked: bool = False
    moved_at: datetime
    moved_by: str
    move: int


class CandidateOut(Wire):
    """The release of a running canary, and its share of the channel's requests in per cent."""

    version: str
    commit: str
    weight: int


class FollowedOut(Wire):
    """A followed channel: its last move, and the version and commit that it serves; these are null if every release is
    yanked. `candidate` is null without a canary."""

    move: int
    version: str | None
    commit: str | None
    candidate: CandidateOut | None = None


class FollowOut(Wire):
    """The followed channels by name; null for one that does not exist or is hidden from the caller."""

    channels: dict[str, FollowedOut | None]


class OtherScoreOut(Wire):
    value: float
    stderr: float | None
    n: int


class GateResultOut(Wire):
    """`value`, `stderr` and `n` are the release's score. `limit` is what the value is compared with, once a margin or
    share has been applied to the `other` score; with `at_least`, the rule passes from the limit upwards, otherwise up
    to it. `sure` says whether the 95 % interval stays on its side of the limit, the error of `other` included. What the
    rule does not use is null, as are the scores of inputs that not every reader may read. Moves that were recorded
    before these fields existed have none of them. `policy` is the policy of a namespace that the rule is from,
    NAMESPACE/*@CHANNEL, and null for the channel's own."""

    rule: str
    passed: bool
    detail: str
    value: float | None = None
    stderr: float | None = None
    n: int | None = None
    higher_is_better: bool | None = None
    limit: float | None = None
    at_least: bool | None = None
    other: OtherScoreOut | None = None
    sure: bool | None = None
    policy: str | None = None


class MoveOut(Wire):
    """An entry of a channel's history: a move, by a promotion, a rollback or a deletion, or a change of what is served
    of the `kind` yank, unyank or policy. `from_version` is null if nothing was served, and equal to `to_version` if
    nothing is served afterwards.

    `changed` is false in the answer to a promotion of what the channel served already: it is then the last move."""

    id: int
    repository: str
    channel: str
    kind: str
    from_version: str | None
    to_version: str
    actor: str
    reason: str
    forced: bool
    gates: list[GateResultOut]
    at: datetime
    changed: bool = True


class ChannelDeleted(Wire):
    """The deleted channel, and the version that it `served`; null if none."""

    repository: str
    channel: str
    served: str | None


class PromoteIn(WireIn):
    version: str = Field(max_length=100)
    reason: str = Field(default="", max_length=1000)
    force: bool = False


class PromotionGateOut(GateResultOut):
    """A `waiting` rule does not pass yet, but may pass without any action."""

    waiting: bool


class PromotionOut(Wire):
    """A promotion that waits or has waited. `state` is pending, completed, refused, conflict, replaced, cancelled or
    expired. It completes only while the channel's last move is `expected_move` (0: none). `error` states why it ended
    without a move, `job` measures the missing scores, and `gates` is the last report."""

    id: int
    repository: str
    channel: str
    version: str
    state: str
    actor: str
    reason: str
    expected_move: int
    move: int | None
    job: int | None
    gates: list[PromotionGateOut]
    error: dict[str, Any] | None
    created_at: datetime
    expires_at: datetime
    ended_at: datetime | None

    @property
    def missing(self) -> tuple[str, ...]:
        """The rules that do not pass yet, each with the reason."""
        return tuple(f"{gate.rule}: {gate.detail}" for gate in self.gates if gate.waiting)


class JudgementOut(Wire):
    """The outcome that a promotion would have now: `passes`, `waits` or `refused`. `served` is the version that the
    channel serves, null for an empty one; `move` is its last move and ETag (0: none). `error` is a refusal for a reason
    other than the rules: a yank, or a signature that the namespace requires."""

    repository: str
    channel: str
    version: str
    verdict: Literal["passes", "waits", "refused"]
    served: str | None
    move: int
    gates: list[PromotionGateOut]
    error: dict[str, Any] | None


class ApprovalIn(WireIn):
    version: str = Field(max_length=100)
    reason: str = Field(default="", max_length=1000)


class ApprovalOut(Wire):
    """A person's approval of a release for a channel. `promotion` is the one that waited for it, in its new state, if
    any."""

    repository: str
    channel: str
    version: str
    user: str
    reason: str
    at: datetime
    promotion: PromotionOut | None


class WithdrawnApprovalOut(Wire):
    """The result of withdrawing an approval: whether there was one."""

    withdrawn: bool


class PinOut(Wire):
    """The suite to which rules refer: the content with this `digest`, and by metric whether `higher_is_better`.
    `changed` describes the differences since then; null if there are none."""

    digest: str
    higher_is_better: dict[str, bool]
    changed: str | None


class ExceptionIn(WireIn):
    """`until` is at most a year from now."""

    until: AwareDatetime
    reason: str = Field(min_length=1, max_length=1000)


class ExceptionOut(Wire):
    """The exception of a repository's channel from its namespace's policy."""

    repository: str
    channel: str
    until: datetime
    reason: str
    created_at: datetime
    created_by: str


class NamespacePolicyOut(Wire):
    """The policy of the channels of this name in every repository of the namespace, as `PolicyOut`. `exceptions` are
    those in force; in a channel's policy, its own."""

    namespace: str
    channel: str
    revision: int
    policy: dict[str, Any]
    pins: dict[str, PinOut]
    exceptions: list[ExceptionOut]


class PolicyOut(Wire):
    """`policy` is described in registry/formats/channel_policy.py; `revision` counts its changes, 0 if none was ever
    set. `pins` maps each suite to what the rules are pinned to. A promotion must meet the `shared` policy too, that of
    its namespace, unless that lists an exception."""

    channel: str
    revision: int
    policy: dict[str, Any]
    pins: dict[str, PinOut]
    shared: NamespacePolicyOut | None = None


class NamespacePoliciesOut(Wire):
    """The policies of a namespace, by channel."""

    policies: list[NamespacePolicyOut]


class RollbackIn(WireIn):
    to: str | None = Field(default=None, max_length=100)
    reason: str = Field(default="", max_length=1000)


class GatesIn(WireIn):
    """`rules` replace those of the channel; if omitted, those stay. `repin` pins them to the current contents of their
    suites."""

    channel: str = Field(max_length=64)
    rules: list[Annotated[str, Field(max_length=300)]] | None = Field(default=None, max_length=50)
    repin: bool = False

    @model_validator(mode="after")
    def _refuse_nothing(self) -> Self:
        if self.rules is None and not self.repin:
            raise ValueError("rules are missing; without them, say repin")
        return self


class GatesOut(Wire):
    """The rules by channel."""

    gates: dict[str, list[str]]


# Documents of workers' keys and attestations.


class WorkerKeyOut(Wire):
    """A worker's key: `id` is the sha256 of the public key in DER. What a key with `revoked_at` signed counts as
    stated."""

    id: str
    worker: str
    public_key: str
    created_at: datetime
    revoked_at: datetime | None
    revoked_by: str | None


class AttestationOut(Wire):
    """`envelope` is a DSSE envelope, as JSON, around an in-toto statement that the key signed."""

    kind: Literal["scores", "composition", "evidence", "other"]
    predicate_type: str
    key: WorkerKeyOut
    envelope: str
    created_at: datetime


class AttestationsOut(Wire):
    """Oldest first."""

    attestations: list[AttestationOut]
