"""Tasks of a suite: the use of an example, and the scoring of the answer.

teacher_forced     the completion's loss, and whether greedy decoding reproduces it; nothing is generated
generation         an answer is generated, and a scorer compares it with the completion
multiple_choice    of the example's choices the likeliest one is the answer
"""

import json
import re
from typing import Annotated, Any, Literal, cast

from pydantic import Field

from composer.formats.recipes.documents import LISTED, Document, ParsedBy, RefusedValues, shorthand

Task = Literal["teacher_forced", "generation", "multiple_choice"]
TEACHER_FORCED: Task = "teacher_forced"

MAX_NEW_TOKENS = 4096
MAX_STOPS = 8
MAX_STOP_CHARS = 100
MAX_SETTINGS_CHARS = 100_000
SCORER_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")


class Generation(Document):
    """The generation of answers. An answer ends at the end of the sequence, before the first stop text, or at the
    limit."""

    max_new_tokens: Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)] = 64
    stop: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)], ...], Field(max_length=MAX_STOPS), LISTED
    ] = Field(default=(), description="An answer ends before the first of these strings.")
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = Field(
        default=0.0, description="0: the likeliest token each time; otherwise tokens are drawn, logits divided by it."
    )
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = Field(
        default=1.0, description="Draw from the likeliest tokens that together have this probability."
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        default=0, description="Each example's own seed is drawn from it."
    )


class MatchSettings(Document):
    """The parts of a text that `match` compares besides its words."""

    case: bool = Field(default=False, description="Whether upper and lower case differ.")
    punctuation: bool = Field(default=True, description="Whether punctuation counts.")


class JsonSettings(Document):
    """`json` has no settings."""


class LikelihoodSettings(Document):
    """Which likelihood chooses."""

    per: Literal["choice", "token", "character"] = Field(
        default="choice",
        description="The divisor of a choice's log-likelihood; long choices have less.",
    )


ANSWER_SCORERS: dict[str, type[Document]] = {"match": MatchSettings, "json": JsonSettings}
"""Scorers of generated answers that come with Adaptory; others are Python entry points."""
_OF_CHOICES: dict[str, type[Document]] = {"likelihood": LikelihoodSettings}
_DEFAULTS: dict[Task, str] = {"generation": "match", "multiple_choice": "likelihood"}


def _read_name(value: object) -> str:
    if not isinstance(value, str) or not SCORER_NAME.fullmatch(value):
        raise ValueError("a name of lower-case letters, digits and _, at most 64")
    return value


def _read_settings(value: object) -> dict[str, Any]:
    try:
        text = json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        text = ""
    if not isinstance(value, dict) or not 0 < len(text) <= MAX_SETTINGS_CHARS:
        raise ValueError(f"a mapping of JSON values, at most {MAX_SETTINGS_CHARS:,} characters")
    return cast("dict[str, Any]", json.loads(text))


JsonMapping = Annotated[dict[str, Any], ParsedBy(_read_settings, {"type": "object"})]
"""JSON values of at most MAX_SETTINGS_CHARS."""


class ScorerChoice(Document):
    """The scorer of answers, by name, and its settings."""

    name: Annotated[str, ParsedBy(_read_name, {"type": "string", "pattern": f"^{SCORER_NAME.pattern}$"})]
    settings: JsonMapping = Field(default_factory=dict[str, Any])


ScorerField = Annotated[ScorerChoice, shorthand("name", str | ScorerChoice)]


def scorer_of(task: Task, chosen: ScorerChoice | None) -> ScorerChoice | None:
    """The scorer of a task with only the settings that differ from their defaults; None for a teacher-forced one.

    Raises Refusal for a scorer that does not fit the task, and pydantic's errors for a setting of a known scorer.
    """
    if task == TEACHER_FORCED:
        if chosen is not None:
            raise RefusedValues("only generated answers and choices have a scorer", "Add `task: generation`.")
        return None
    chosen = chosen or ScorerChoice(name=_DEFAULTS[task])
    known = _OF_CHOICES if task == "multiple_choice" else ANSWER_SCORERS
    others = ANSWER_SCORERS if task == "multiple_choice" else _OF_CHOICES
    if chosen.name in others or (task == "multiple_choice" and chosen.name not in known):
        raise RefusedValues(f"{chosen.name} does not score {task}", f"Scorers for it: {', '.join(known)}.")
    if chosen.name not in known:
        return chosen
    settings = known[chosen.name].model_validate(chosen.settings)
    return ScorerChoice(name=chosen.name, settings=settings.model_dump(exclude_defaults=True))
