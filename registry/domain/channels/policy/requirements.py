"""Requirements of a policy besides scores: soak in another channel, approvals, signature, licences, verdict,
servers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Row, select
from sqlalchemy.orm import Session

from composer.findings import Verdict
from composer.formats.adapters.serving import ServerProfile, loads, parse_profile
from registry.database.tables import Approval, Base, Composition, Namespace, Release, ReleaseInput
from registry.domain.access import namespaces, tokens
from registry.domain.access.audit import Actor
from registry.domain.access.roles import EVERYWHERE, Role, at_least
from registry.domain.catalog import attestations, signatures
from registry.domain.catalog.signatures import SignedAs
from registry.domain.channels.policy.gates import GateResult, lineage_of
from registry.domain.channels.serving import last_period, unspent_approvals
from registry.domain.jobs.evaluations import WantedScore
from registry.formats.channel_policy import ApprovalRule as NeededApproval
from registry.formats.channel_policy import ChannelPolicy, Combination, Licenses, Soak
from registry.formats.licenses import Choice, choices, meets, spdx
from registry.formats.signatures import is_key_of

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


def licenses_of(session: Session, release: Release) -> list[Stated]:
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


def judge_licenses(session: Session, policy: Licenses, release: Release) -> list[GateResult]:
    """A result for each rule about the licences of a release, its base and its data; a refusal names the part or the
    combination. `A OR B` passes if one of the two does, since a user may choose, and `A AND B` if both do. Licences of
    inputs in private namespaces are judged like all others, but not shown."""
    return judge_stated(policy, licenses_of(session, release))


def judge_stated(policy: Licenses, stated: Sequence[Stated]) -> list[GateResult]:
    """Judges like `judge_licenses`, for the stated licences."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A promotion to be judged. `channel` need not exist yet, and `served` is the release that it serves. `given_up`
    maps scores that will no longer be measured to the reason."""

    actor: Actor
    release: Release
    channel: str
    served: Release | None
    given_up: Mapping[WantedScore, str] = field(default_factory=dict[WantedScore, str])


def judge(session: Session, policy: ChannelPolicy, question: Question) -> list[GateResult]:
    """Judges the requirements of the policy besides scores."""
    release, results = question.release, [_soak(session, policy, soak, question) for soak in policy.soak]
    if policy.approval is not None:
        results.append(_approval(session, policy.approval, question))
    if policy.signature is not None:
        results.append(_signature(session, policy.signature, release))
    if policy.licenses is not None:
        results += judge_licenses(session, policy.licenses, release)
    if policy.origin is not None:
        results.append(_origin(session, release))
    if policy.verdict is not None:
        results.append(_verdict(session, Verdict(policy.verdict), release))
    return results + [_loads(release, parse_profile(server)) for server in policy.loads_in]


def _soak(session: Session, policy: ChannelPolicy, soak: Soak, question: Question) -> GateResult:
    """The last period in which the channel served the release. A period ended by a rollback does not count."""
    rule = f"{soak.hours:g} h in {soak.channel}"
    moves = last_period(session, question.release, soak.channel)
    if moves is None:
        return GateResult(rule, False, f"{soak.channel} has never served it")
    began, left = moves
    now = question.actor.at
    if left is not None and left.kind == "rollback":
        return GateResult(rule, False, f"{soak.channel} was rolled back from it at {left.at:%Y-%m-%d %H:%M} UTC")
    served = (left.at if left is not None else now) - began.at
    needed = timedelta(hours=soak.hours)
    hours = f"{served.total_seconds() / 3600:.3g} of {soak.hours:g} h"
    detail = f"{soak.channel} {'served' if left else 'has served'} it for {hours}"
    if served >= needed:
        return GateResult(rule, True, detail)
    if left is not None:
        return GateResult(rule, False, detail)
    until = began.at + needed
    if until - now > timedelta(hours=policy.expires_hours):
        return GateResult(rule, False, f"{detail}; a promotion waits for {policy.expires_hours:g} h at most")
    return GateResult(rule, False, f"{detail}, until {until:%Y-%m-%d %H:%M} UTC", waiting=True, until=until)


def _approval(session: Session, needed: NeededApproval, question: Question) -> GateResult:
    people = f"{needed.count} other people" if needed.count > 1 else "another person"
    rule = f"approval by {people} with the role {needed.role}"
    given = unspent_approvals(session, question.release, question.channel)
    others = [approval for approval in given if approval.user != question.actor.name]
    at = (question.release.repository.namespace, Role(needed.role), question.actor.at)
    names = [approval.user for approval in others if _has_role(session, approval, *at)]
    detail = f"{len(names)} of {needed.count}" + (f": {', '.join(names)}" if names else "")
    lost = sorted({approval.user for approval in others} - set(names))
    detail += f"; {', '.join(lost)} no longer {'has' if len(lost) == 1 else 'have'} the role" if lost else ""
    passed = len(names) >= needed.count
    return GateResult(rule, passed, detail, waiting=not passed)


def _has_role(session: Session, approval: Approval, namespace: str, role: Role, now: datetime) -> bool:
    """Whether the approver has the role now: as a member, or by a group of the provider, in a session that is in force.
    Without a token, it was a user of a registry without access control."""
    if approval.token_id is None:
        return True
    roles = [namespaces.roles_of(session, approval.user), tokens.roles_given(session, approval.token_id, now)]
    known = (granted[name] for granted in roles for name in (namespace, EVERYWHERE) if name in granted)
    return any(at_least(granted, role) for granted in known)


def _signature(session: Session, needed: str, release: Release) -> GateResult:
    namespace = session.get_one(Namespace, release.repository.namespace)
    if needed == SignedAs.PUBLISHER:
        kinds = signatures.signers(session, release, namespace.signing_keys)
        publishers = [signed_by for signed_by, kind in kinds.items() if kind == SignedAs.PUBLISHER]
        detail = "only a worker has signed it" if kinds else f"no key of {namespace.name} has signed it"
        detail = f"signed by {publishers[0][:16]}" if publishers else detail
        return GateResult("signature of the release by a publisher", bool(publishers), detail)
    named = (release.signed_by, release.signature_covers)
    signed_by, covered = signatures.signer(session, release.id, namespace.signing_keys, named)
    rule = f"signature of the {needed}"
    if not is_key_of(namespace.signing_keys, signed_by):
        name, keys = namespace.name, namespace.signing_keys
        return GateResult(rule, False, f"no key of {name} has signed it" if keys else f"{name} has no signing key")
    passed = covered == "release" or needed == "files"
    detail = f"signed by {(signed_by or '')[:16]}"
    return GateResult(rule, passed, detail if passed else f"{detail}, which covers only files")


def _origin(session: Session, release: Release) -> GateResult:
    made = attestations.of_composition(session, release)
    detail = f"composed by the worker {made.key.worker}" if made else "no worker attests that it composed it"
    return GateResult("composed by a worker", made is not None, detail)


def _verdict(session: Session, worst: Verdict, release: Release) -> GateResult:
    """The verdict of the release's composition or, if that passes, of the first composition in its lineage that does
    not: composing its output once more, alone, would show no conflict. A release that was not composed in this registry
    passes."""
    rule = f"verdict {worst}" if worst is Verdict.OK else f"verdict {worst} or better"
    made = select(Composition.conflicts, Composition.recipe, Composition.lock)
    made = made.join(ReleaseInput, ReleaseInput.composition_id == Composition.id)
    results: list[GateResult] = []
    for ancestor in lineage_of(session, release):
        if row := session.execute(made.where(ReleaseInput.release_id == ancestor.id).limit(1)).first():
            result = _verdict_of(row, rule, worst)
            shown = ancestor.repository.namespace in (release.repository.namespace, *namespaces.public_names(session))
            why = result.detail if shown else "it is in a private namespace, and its verdict is not shown"
            of_input = f"for an input that was composed before: {why}"
            results.append(result if ancestor is release else replace(result, detail=of_input))
    failed = next((result for result in results if not result.passed), None)
    return failed or next(iter(results), GateResult(rule, True, "not composed here"))


def _verdict_of(row: Row[*tuple[Any, ...]], rule: str, worst: Verdict) -> GateResult:
    """The verdict under the default limits: a composition's recipe may have loosened its own. A set combines nothing,
    so that nothing in it can conflict."""
    if row.lock.get("set"):
        return GateResult(rule, True, "a set combines nothing")
    if row.conflicts is None:
        return GateResult(rule, False, "its composition has no conflict report")
    own, judged = Verdict(row.conflicts["verdict"]), row.conflicts.get("by_default")
    if judged is None and set(row.recipe.get("policy") or {}) - {"require"}:
        why = f"its recipe's policy says {own}; the default limits were not recorded with it: compose it again"
        return GateResult(rule, False, why)
    verdict = Verdict(judged["verdict"]) if judged else own
    codes = ", ".join(dict.fromkeys(finding["code"] for finding in judged["findings"])) if judged else ""
    detail = f"the conflict check of its inputs says {verdict}{f' ({codes})' if codes else ''}"
    detail += f"; {own} by its recipe's policy, which does not count here" if own is not verdict else ""
    return GateResult(rule, Verdict.worst([worst, verdict]) is worst, detail)


def _loads(release: Release, server: ServerProfile) -> GateResult:
    """Whether servers load the release. A model passes: they load it as a checkpoint, not as an adapter."""
    rule = f"loads in {server}"
    if release.rank_max is None:
        return GateResult(rule, True, "a model")
    loading = loads(release.servers, release.loading, release.rank_max, server)
    return GateResult(rule, loading.loads, "; ".join(loading.reasons) or "as it is")
