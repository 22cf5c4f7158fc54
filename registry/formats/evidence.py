"""Evidence for the check of servers: token ids of a few examples with their log-probabilities, and the decision whether
a server's own log-probabilities are the release's."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, isnan
from typing import Any, Literal

from registry.errors import Invalid
from registry.formats.attestations import EVIDENCE, Statement

_NEARER = 0.5
"""A share from here on is nearer to the release than to its base. No other adapter of the tests has one above 0.45."""
_LEAST = 0.01
"""In nats a token: a release that differs less from its base looks like it."""
_FARTHEST = 1e4
"""In nats: a server may answer infinity or NaN, which would leave no figures to compare or to report."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """The limits of a proof: the least `share`, and the most that one token may be off, in nats."""

    share: float = 0.9
    worst: float = 0.3

    @classmethod
    def within(cls, nats: float) -> "Tolerance":
        """The limits for servers that differ by that much, as their operator states, such as those of quantized bases.
        The base, and an adapter that is nearer to it than to the release, still are not proved."""
        return cls(0.75, nats)


USUAL = Tolerance()
"""For servers that compute as the worker did."""


@dataclass(frozen=True, slots=True)
class EvidenceExample:
    """`ids` are the prompt's tokens, then the completion's from `start` on; `release` and `base` are the
    log-probabilities of the latter, in nats."""

    ids: tuple[int, ...]
    start: int
    release: tuple[float, ...]
    base: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Served:
    """The degree to which a server applies a release: a `share` of 1 is the release, and 0 as far from it as its base
    is; `worst` is the largest difference of one token, in nats."""

    share: float
    worst: float
    limits: Tolerance = USUAL

    def verdict(self, *, loosely: bool = False) -> Literal["proved", "unproved", "failed"]:
        """Proved within the limits; failed if a token is off or the server is as near to the base as to the release;
        else unproved, since the evidence cannot tell. `loosely` lets tokens be off."""
        is_near = self.worst <= self.limits.worst
        if is_near and self.share >= self.limits.share:
            return "proved"
        return "unproved" if (is_near or loosely) and self.share >= _NEARER else "failed"

    def __str__(self) -> str:
        return (
            f"share {self.share:.3f} (at least {self.limits.share:g}), worst token {self.worst:.2f} nats (at most "
            f"{self.limits.worst:g})"
        )


def evidence_of(statement: Statement) -> tuple[EvidenceExample, ...]:
    """The examples of an attestation of evidence. Raises Invalid for anything else, and for evidence by which the
    release looks like its base."""
    try:
        if statement.predicate_type != EVIDENCE:
            raise _bad("it attests something else")
        examples = tuple(_example(row) for row in statement.predicate["examples"])
    except (ValueError, KeyError, TypeError) as error:
        raise _bad("its examples do not have the form that this version reads") from error
    tokens = sum(len(example.release) for example in examples)
    apart = sum(abs(own - base) for row in examples for own, base in zip(row.release, row.base, strict=True))
    if apart <= _LEAST * tokens:
        raise _bad("the release answers its examples as its base does")
    return examples


def decide(
    examples: Sequence[EvidenceExample], answered: Sequence[Sequence[float | None]], limits: Tolerance = USUAL
) -> Served:
    """Compares a server's log-probabilities of each example's completion tokens with the evidence, for as many of the
    first tokens as it answered; at least one. None stands for a token that the server does not report.

    share = 1 - |server - release| / |base - release|, each the sum of absolute differences over these tokens: those of
    tokens that became more and less probable do not cancel.
    """
    rows = [
        (abs(value - release), abs(base - release))
        for example, values in zip(examples, answered, strict=True)
        for value, release, base in zip(values, example.release, example.base, strict=False)
        if value is not None
    ]
    off, apart = (sum(values) for values in zip(*rows, strict=True))
    return Served(1 - off / (apart or 1.0), max(own for own, _ in rows), limits)


def log_probability(said: object) -> float:
    """A server's log-probability; one that is not finite becomes a number that is far off. Raises ValueError or
    TypeError for what is not a number."""
    value = float(said)  # pyright: ignore[reportArgumentType]
    return -_FARTHEST if isnan(value) else max(-_FARTHEST, min(value, _FARTHEST))


def _example(row: Any) -> EvidenceExample:
    release, base = tuple(map(float, row["release"])), tuple(map(float, row["base"]))
    example = EvidenceExample(tuple(map(int, row["ids"])), int(row["start"]), release, base)
    if not 0 < example.start < len(example.ids) or {len(release), len(base)} != {len(example.ids) - example.start}:
        raise ValueError
    if not all(map(isfinite, release + base)):
        raise ValueError
    return example


def _bad(why: str) -> Invalid:
    return Invalid("bad_evidence", f"Evidence cannot be used: {why}.")
