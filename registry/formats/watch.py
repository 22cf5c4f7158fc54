"""The watch of a canary: `watch` of a channel's policy, and its rules.

errors <= served + 0.01              the share of requests that fail
errors <= 0.05
p95_seconds <= 1.2 x served          a quantile of the time to the end of an answer: p50, p90, p95 or p99
p95_seconds <= 3
sql-live.accuracy >= served - 2 se   any mean of values from 0 to 1 that somebody reports, less two standard errors
"""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, model_validator

from composer.formats.recipes.documents import LISTED, Document, ParsedBy, RefusedValues
from registry.errors import Usage

_UNITS = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}
_DURATION = re.compile("".join(rf"(?:(\d{{1,6}}){unit})?" for unit in _UNITS))


def parse_duration(text: str) -> int:
    """The seconds of a duration such as `90s`, `5m` or `1h30m`. Raises Usage for anything else."""
    match = _DURATION.fullmatch(text.strip())
    if match is None or not any(match.groups()):
        raise Usage("bad_duration", f"{text[:80]!r} is not a duration.", subject=text[:80])
    return sum(int(number or 0) * unit_s for number, unit_s in zip(match.groups(), _UNITS.values(), strict=True))


ERRORS = "errors"
MAX_RULES, MAX_WATCH_S = 20, 30 * 86_400
_NUMBER = r"(\d{1,9}(?:\.\d{1,9})?)"
_RULE = re.compile(
    rf"([a-z0-9][a-z0-9_.-]{{0,99}})\s*(<=|>=)\s*(?:{_NUMBER}|(?:{_NUMBER}\s*x\s*)?served(?:\s*([+-])\s*{_NUMBER}\s*(se)?)?)"
)
_QUANTILE = re.compile(r"p(50|90|95|99)_seconds")


@dataclass(frozen=True, slots=True)
class WatchRule:
    """A rule about the figure `name` of the candidate: a limit, or the served release's own figure times `factor`, with
    a `margin`, which counts standard errors if `in_errors`. `quantile` is set for times."""

    text: str
    name: str
    at_least: bool
    limit: float | None
    factor: float = 1.0
    margin: float = 0.0
    in_errors: bool = False

    @property
    def quantile(self) -> float | None:
        match = _QUANTILE.fullmatch(self.name)
        return int(match[1]) / 100 if match else None


def parse_rule(text: str) -> WatchRule:
    """Parses a rule. Raises ValueError, with the reason, for one that cannot be tested."""
    match = _RULE.fullmatch(text.strip())
    if match is None:
        raise ValueError(
            "a rule such as `errors <= served + 0.01`, `p95_seconds <= 1.2 x served` or `suite.metric >= served - 2 se`"
        )
    name, sign, limit, factor, side, margin, unit = match.groups()
    rule = WatchRule(
        text.strip(),
        name,
        sign == ">=",
        float(limit) if limit else None,
        float(factor or 1),
        float(margin or 0),
        unit is not None,
    )
    if rule.quantile is None and name.endswith("_seconds"):
        raise ValueError("p50_seconds, p90_seconds, p95_seconds or p99_seconds")
    if rule.quantile is not None and (rule.at_least or margin):
        raise ValueError(f"`{name} <= 1.2 x served`, or a number of seconds: times have no other rules")
    if rule.quantile is None and factor:
        raise ValueError(f"`{name}` with a margin, such as `served + 0.01`: only times have a factor")
    if margin and (side == "-") is not rule.at_least:
        raise ValueError("a margin that allows something: `<= served + N` or `>= served - N`")
    if rule.quantile is None and rule.limit is not None and rule.limit > 1:
        raise ValueError("a limit from 0 to 1")
    if name == ERRORS and rule.at_least:
        raise ValueError("`errors <= …`")
    return rule


def _seconds(value: object) -> str:
    try:
        if isinstance(value, str) and 1 <= parse_duration(value) <= MAX_WATCH_S:
            return value
    except Usage:
        pass
    raise ValueError("a time such as 30m or 1h30m, 30 days at most")


def _checked(text: str) -> str:
    try:
        parse_rule(text)
    except ValueError as error:
        raise RefusedValues(f"{text!r} is not {error}") from error
    return text


class Watch(Document):
    """The steps of a canary. Each lasts `for` at least, and until the candidate and the served release have
    answered `min` requests; the last step is the promotion. A broken rule ends the canary at any time."""

    step_for: Annotated[str, ParsedBy(_seconds, {"type": "string"})] = Field(
        alias="for", description="The length of each step: 30m."
    )
    steps: Annotated[tuple[Annotated[int, Field(ge=1, le=100)], ...], Field(min_length=1, max_length=20), LISTED] = (
        Field((10, 50, 100), description="Per cent of the requests at each step; the last one is 100.")
    )
    rules: Annotated[
        tuple[Annotated[str, Field(max_length=300), AfterValidator(_checked)], ...],
        Field(min_length=1, max_length=MAX_RULES),
        LISTED,
    ] = Field(description="Rules about live figures: errors <= served + 0.01")
    least: Annotated[int, Field(ge=1, le=2**31 - 1)] = Field(
        200, alias="min", description="Requests before a decision."
    )

    @model_validator(mode="after")
    def _refuse_disorder(self) -> Self:
        if list(self.steps) != sorted(set(self.steps)) or self.steps[-1] != 100:
            raise RefusedValues("its steps do not rise to 100", "Write steps such as [10, 50, 100].")
        return self

    @property
    def step_s(self) -> int:
        return parse_duration(self.step_for)

    @property
    def parsed(self) -> list[WatchRule]:
        return [parse_rule(rule) for rule in self.rules]

    def after(self, weight: int) -> int:
        """The step after a weight."""
        return next((step for step in self.steps if step > weight), 100)

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json", by_alias=True)
