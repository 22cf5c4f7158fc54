"""Licences of a release, its base and its data, judged by a policy.

`A OR B` passes if one of the two does, since a user may choose, and `A AND B` if both do. Licences of inputs in private
namespaces are judged like all others, but not shown.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sqlalchemy.orm import Session

from registry.database.tables import Base, Release
from registry.domain.access import namespaces
from registry.domain.channels.gates import GateResult, lineage_of
from registry.formats.channel_policy import Combination, Licenses
from registry.formats.licenses import Choice, choices, meets, spdx

PARTS = ("base", "adapter", "data")
_MAX_STATES = 1000
"""Limit on the ways to choose among all licences. Ignoring further ones can only refuse more."""


@dataclass(frozen=True, slots=True)
class Stated:
    """The licence of a `part`: the base, the adapter, or its data; None if it is not stated. A `hidden` one belongs to
    an input in another, private namespace."""

    part: str
    name: str | None
    hidden: bool = False

    def __str__(self) -> str:
        if self.hidden:
            return f"{self.part} of an input in a private namespace"
        return f"{self.part} {self.name or 'without a licence'}"

    def choices(self, rules: Licenses) -> Sequence[Choice]:
        """The choices that the policy's list allows; all of them if it allows none."""
        every = choices(self.name) if self.name is not None else ()
        return [choice for choice in every if is_allowed(rules, self, choice)] or every


def of_release(session: Session, release: Release) -> list[Stated]:
    """The licences of a release and of all inputs of its composition, each once."""
    parts: dict[Stated, None] = {}
    shown = {release.repository.namespace, *namespaces.public_names(session)}
    for ancestor in lineage_of(session, release):
        own = _own(
            session, ancestor, composed=ancestor.id != release.id, hidden=ancestor.repository.namespace not in shown
        )
        parts |= dict.fromkeys(own)
    return sorted(parts, key=lambda stated: (PARTS.index(stated.part), stated.hidden, stated.name or ""))


def _own(session: Session, release: Release, *, composed: bool, hidden: bool) -> Iterator[Stated]:
    provenance = release.provenance
    known, stated = session.get_one(Base, release.base_digest).license, provenance.get("base_license")
    base = known or stated
    yield Stated("base", spdx(base) if base else None, hidden and known is None and stated is not None)
    if release.license or not composed:
        yield Stated("adapter", spdx(release.license) if release.license else None, hidden)
    for row in provenance.get("data", ()):
        yield Stated("data", spdx(row["license"]) if row.get("license") else None, hidden)


def judge(session: Session, policy: Licenses, release: Release) -> list[GateResult]:
    """A result for each rule about licences; a refusal names the part or the combination."""
    return results_of(policy, of_release(session, release))


def results_of(policy: Licenses, stated: Sequence[Stated]) -> list[GateResult]:
    """As `judge`, for the stated licences."""
    results: list[GateResult] = []
    for part in policy.stated:
        own = [licence for licence in stated if licence.part == part]
        passed = bool(own) and all(licence.name for licence in own)
        results.append(GateResult(f"licence of the {part} is stated", passed, _listed(stated)))
    if policy.allow is not None:
        named = [licence for licence in stated if licence.name is not None]
        others = [
            licence
            for licence in named
            if not any(is_allowed(policy, licence, choice) for choice in choices(licence.name or ""))
        ]
        detail = f"refused: {_listed(others)}" if others else _listed(stated)
        results.append(GateResult(f"licences in {', '.join(policy.allow)}", not others, detail))
    plain = [rule for rule in policy.refuse if isinstance(rule, str)]
    combined = _unavoidable(policy, stated, [rule for rule in policy.refuse if isinstance(rule, Combination)])
    for rule in policy.refuse:
        if isinstance(rule, str):
            results.append(_refused(policy, rule, plain, stated))
        else:
            words = " with ".join(f"{part} {spdx(name)}" for part, name in _given(rule))
            detail = f"refused combination: {words}" if rule in combined else _listed(stated)
            results.append(GateResult(f"no {words}", rule not in combined, detail))
    return results


def is_allowed(policy: Licenses, stated: Stated, choice: Choice) -> bool:
    """Whether every licence of the choice is in the policy's list, if there is one."""
    if policy.allow is None:
        return True
    return any(is_named(rule, stated) for rule in policy.allow) or all(
        any(meets(rule, frozenset({key})) for rule in policy.allow) for key in choice
    )


def is_named(rule: str, stated: Stated) -> bool:
    """Whether the rule names all that is stated, which may be an expression."""
    return stated.name is not None and spdx(rule) == stated.name


def _about(rule: str, stated: Stated, choice: Choice) -> bool:
    return is_named(rule, stated) or meets(rule, choice)


def _refused(policy: Licenses, rule: str, plain: Sequence[str], stated: Sequence[Stated]) -> GateResult:
    """A part is refused if each of its choices is, by this rule or another one."""
    refused: list[Stated] = []
    for licence in stated:
        offered = licence.choices(policy)
        by_all = all(any(_about(other, licence, choice) for other in plain) for choice in offered)
        if offered and by_all and any(_about(rule, licence, choice) for choice in offered):
            refused.append(licence)
    return GateResult(f"no {rule}", not refused, f"refused: {_listed(refused)}" if refused else _listed(stated))


def _unavoidable(policy: Licenses, stated: Sequence[Stated], rules: Sequence[Combination]) -> list[Combination]:
    """The combinations that no choice of licences avoids."""
    named = {(part, name) for rule in rules for part, name in _given(rule)}
    states = {frozenset[tuple[str, str]]()}
    for licence in stated:
        offered = [
            frozenset((part, name) for part, name in named if part == licence.part and _about(name, licence, choice))
            for choice in licence.choices(policy)
        ]
        states = {state | more for state in states for more in offered} if offered else states
        states = set(sorted(states, key=lambda state: (len(state), sorted(state)))[:_MAX_STATES])
    met = [[rule for rule in rules if state.issuperset(_given(rule))] for state in states]
    if not all(met):
        return []
    return [rule for rule in rules if all(rule in some for some in met)] or [
        rule for rule in rules if any(rule in some for some in met)
    ]


def _given(rule: Combination) -> list[tuple[str, str]]:
    return [(part, name) for part, name in rule.given().items() if name is not None]


def _listed(stated: Sequence[Stated]) -> str:
    return ", ".join(dict.fromkeys(map(str, stated)))
