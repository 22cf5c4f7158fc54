"""Licences of a release, its base and its data, judged by a policy."""

from collections.abc import Iterator
from dataclasses import dataclass

from sqlalchemy.orm import Session

from registry.database.tables import Base, Release
from registry.domain.channels.gates import GateResult, inputs_of
from registry.formats.channel_policy import Combination, Licenses
from registry.formats.licenses import spdx

PARTS = ("base", "adapter", "data")


@dataclass(frozen=True, slots=True)
class Stated:
    """A licence, None if it is not stated, of a `part`: the base, the adapter, or its data."""

    part: str
    name: str | None

    def __str__(self) -> str:
        return f"{self.part} {self.name or 'without a licence'}"


def of_release(session: Session, release: Release) -> list[Stated]:
    """The licences of a release and of all inputs of its composition, each once."""
    parts: dict[Stated, None] = {}
    left, seen = [release], {release.id}
    while left:
        one = left.pop()
        parts |= dict.fromkeys(_own(session, one, composed=one.id != release.id))
        further = [source for source in inputs_of(session, one) or () if source.id not in seen]
        seen |= {source.id for source in further}
        left += further
    return sorted(parts, key=lambda stated: (PARTS.index(stated.part), stated.name or ""))


def _own(session: Session, release: Release, *, composed: bool) -> Iterator[Stated]:
    provenance = release.provenance
    base = session.get_one(Base, release.base_digest).license or provenance.get("base_license")
    yield Stated("base", spdx(base) if base else None)
    if release.license or not composed:
        yield Stated("adapter", spdx(release.license) if release.license else None)
    for row in provenance.get("data", ()):
        yield Stated("data", spdx(row["license"]) if row.get("license") else None)


def judge(session: Session, policy: Licenses, release: Release) -> list[GateResult]:
    """A result for each rule about licences; a refusal names the part or the combination."""
    stated = of_release(session, release)
    there = ", ".join(map(str, stated))
    results: list[GateResult] = []
    for part in policy.stated:
        own = [one for one in stated if one.part == part]
        passed = bool(own) and all(one.name for one in own)
        results.append(GateResult(f"licence of the {part} is stated", passed, there))
    if policy.allow is not None:
        allowed = set(map(spdx, policy.allow))
        others = [one for one in stated if one.name is not None and one.name not in allowed]
        detail = f"refused: {', '.join(map(str, others))}" if others else there
        results.append(GateResult(f"licences in {', '.join(policy.allow)}", not others, detail))
    results += [_refused(one, stated, there) for one in policy.refuse]
    return results


def _refused(refused: str | Combination, stated: list[Stated], there: str) -> GateResult:
    if isinstance(refused, str):
        matching = [one for one in stated if one.name == spdx(refused)]
        detail = f"refused: {', '.join(map(str, matching))}" if matching else there
        return GateResult(f"no {refused}", not matching, detail)
    parts = {part: spdx(name) for part, name in refused.given().items() if name is not None}
    words = " with ".join(f"{part} {name}" for part, name in parts.items())
    together = all(Stated(part, name) in stated for part, name in parts.items())
    return GateResult(f"no {words}", not together, f"refused combination: {words}" if together else there)
