"""Schemas of suites, scores, channels, moves and gates."""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import Field

from composer.formats.recipes.suite import MAX_EXAMPLES
from registry.api.schemas.wire import MAX_INT32, Wire, WireIn

MAX_ANSWER_CHARS = 2_000


class ScoreOut(Wire):
    suite: str
    suite_digest: str
    task: str
    metric: str
    value: float
    stderr: float | None
    n: int
    higher_is_better: bool
    measured: datetime


class ScoreIn(Wire):
    suite_digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    metric: str = Field(pattern=r"^[a-z_][a-z0-9_]{0,63}$")
    value: float = Field(allow_inf_nan=False)
    stderr: float | None = Field(default=None, allow_inf_nan=False, ge=0)
    n: int = Field(ge=1, le=MAX_INT32)
    higher_is_better: bool


class ExampleResult(Wire):
    """One example: nats and tokens of the reference completion, the score of the answer from 0 to 1, and the generated
    or chosen answer. `cut` if the limit of tokens ended it."""

    nats: float = Field(allow_inf_nan=False, ge=0)
    tokens: int = Field(ge=1, le=MAX_INT32)
    score: float = Field(ge=0, le=1)
    answer: str | None = Field(default=None, max_length=MAX_ANSWER_CHARS)
    cut: bool = False


class SuiteResults(Wire):
    """The results of all examples of a suite, in its order."""

    suite_digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    examples: list[ExampleResult] = Field(min_length=1, max_length=MAX_EXAMPLES)


class SuiteResultsOut(SuiteResults):
    suite: str


class ScoresIn(WireIn):
    """`results` are those that the scores of their suites are made of; optional."""

    scores: list[ScoreIn] = Field(min_length=1, max_length=1000)
    results: list[SuiteResults] = Field(default=[], max_length=1000)


class ScoresOut(Wire):
    scores: list[ScoreOut]


class SuiteOut(Wire):
    """`metrics` are those whose better direction the suite's file declares; `content` has the examples."""

    name: str
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
    """`move` is the id of the last move and the channel's ETag. `version` is what the channel serves, null if every
    candidate is yanked; `passes_over` is the version of the last move, if that is yanked."""

    repository: str
    channel: str
    version: str | None
    commit: str | None
    passes_over: str | None = None
    moved_at: datetime
    moved_by: str
    move: int


class GateResultOut(Wire):
    rule: str
    passed: bool
    detail: str


class MoveOut(Wire):
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


class PromoteIn(WireIn):
    version: str = Field(max_length=100)
    reason: str = Field(default="", max_length=1000)
    force: bool = False


class RollbackIn(WireIn):
    to: str | None = Field(default=None, max_length=100)
    reason: str = Field(default="", max_length=1000)


class GatesIn(WireIn):
    channel: str = Field(max_length=64)
    rules: list[Annotated[str, Field(max_length=300)]] = Field(max_length=50)


class GatesOut(Wire):
    """The rules by channel."""

    gates: dict[str, list[str]]
