"""Evidence for the check of servers: token ids of a few examples with their log-probabilities, and the decision whether
a server's own log-probabilities are the release's."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from registry.errors import Invalid
from registry.formats.attestations import EVIDENCE, Statement

MIN_SHARE = 0.9
MAX_OFF = 0.3
"""In nats, of one token."""
_LEAST = 0.01
"""In nats a token: a release that differs less from its base looks like it."""


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
    """How far a server applies a release: a `share` of 1 is the release and 0 its base; `worst` is the largest
    difference of one token, in nats."""

    share: float
    worst: float

    @property
    def proved(self) -> bool:
        return self.share >= MIN_SHARE and self.worst <= MAX_OFF

    def __str__(self) -> str:
        return (
            f"share {self.share:.3f} (at least {MIN_SHARE:g}), worst token {self.worst:.2f} nats (at most {MAX_OFF:g})"
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
    apart = sum(sum(example.release) - sum(example.base) for example in examples)
    if abs(apart) <= _LEAST * tokens:
        raise _bad("the release answers its examples as its base does")
    return examples


def decide(examples: Sequence[EvidenceExample], answered: Sequence[Sequence[float]]) -> Served:
    """Compares a server's log-probabilities of each example's completion tokens with the evidence, for as many of the
    first tokens as it answered; at least one.

    share = (base - server) / (base - release), each the sum of negative log-probabilities over these tokens.
    """
    rows = [
        row
        for example, values in zip(examples, answered, strict=True)
        for row in zip(values, example.release, example.base, strict=False)
    ]
    server, release, base = (sum(values) for values in zip(*rows, strict=True))
    worst = max(abs(value - own) for value, own, _ in rows)
    return Served((server - base) / (release - base or 1.0), worst)


def _example(row: Any) -> EvidenceExample:
    release, base = tuple(map(float, row["release"])), tuple(map(float, row["base"]))
    example = EvidenceExample(tuple(map(int, row["ids"])), int(row["start"]), release, base)
    if not 0 < example.start < len(example.ids) or {len(release), len(base)} != {len(example.ids) - example.start}:
        raise ValueError
    return example


def _bad(why: str) -> Invalid:
    return Invalid("bad_evidence", f"Evidence cannot be used: {why}.")
