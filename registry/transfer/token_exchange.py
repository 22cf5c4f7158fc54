"""Exchanges the ID token of a job of continuous integration for a token of this registry (RFC 8693)."""

import re
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from registry.domain.access import audit, publishers
from registry.domain.access.audit import Act, Actor, RefusalBudget
from registry.domain.access.publishers import (
    LIFETIME,
    MAX_USER,
    Assertion,
    NewPublisher,
    bad_publisher,
    job_name,
)
from registry.domain.access.roles import ANONYMOUS
from registry.environment.settings import Claims, Settings
from registry.errors import Invalid, NotAllowed, Refused, Unauthenticated
from registry.formats import id_tokens
from registry.formats.id_tokens import CiJob, shown
from registry.formats.references import RepositoryName
from registry.transfer.issuer_keys import IssuerKeys
from registry.transfer.resources import Resources


@dataclass(frozen=True, slots=True)
class Exchanged:
    """`token` is the secret."""

    token: str
    expires_in_s: int


@dataclass(slots=True)
class TokenExchange:
    """One for each process: it caches the keys of issuers."""

    resources: Resources
    keys: IssuerKeys = field(default_factory=IssuerKeys)
    _refusals: dict[bool, RefusalBudget] = field(
        default_factory=lambda: {known: RefusalBudget() for known in (False, True)}
    )
    """A separate budget for tokens of known jobs, which can be sent repeatedly."""

    def exchange(self, text: str, repository: RepositoryName, source: str) -> Exchanged:
        """Verifies the ID token and issues a token to its job. Every refusal of the token gets an audit row. Raises
        Unauthenticated for a token that is not valid here, NotAllowed for a job that may not publish in the repository,
        Unavailable if its issuer cannot be reached, and Refused if the registry exchanges no tokens.
        """
        resources, audience = self.resources, self.resources.settings.oidc_audience
        if not audience:
            raise Refused("exchange_disabled", "This registry exchanges no ID tokens.")
        actor, job = Actor(ANONYMOUS, resources.clock(), {}, source=source), None
        try:
            assertion = self._verified(text, audience, actor.at)
            job = assertion.job
            actor = replace(actor, name=job_name(job.issuer, job.project)[:MAX_USER])
            with resources.write() as session:
                _, secret = publishers.exchange(session, actor, repository, assertion)
        except NotAllowed as error:
            self._record(actor, repository, error, job)
            raise
        return Exchanged(secret, int(LIFETIME.total_seconds()))

    def _verified(self, text: str, audience: str, now: datetime) -> Assertion:
        token = id_tokens.parse(text)
        layout = self.resources.settings.issuers.get(token.issuer)
        with self.resources.read() as session:
            known = layout is not None and publishers.uses(session, token.issuer)
        if layout is None or not known:
            raise Unauthenticated(
                "id_token_issuer",
                f"No trusted publisher has the issuer {shown(token.issuer)}.",
                subject=shown(token.issuer),
                next_step="Check the rules (`adaptory publisher list REPO`) and ADAPTORY_OIDC_ISSUERS.",
            )
        id_tokens.verify(token, self.keys.find(token.issuer, token.key_id))
        expires_at = id_tokens.check(token, audience, now)
        return Assertion(id_tokens.job_of(token, layout), id_tokens.replay_key(token), expires_at)

    def _record(self, actor: Actor, repository: RepositoryName, error: NotAllowed, job: CiJob | None) -> None:
        if not self._refusals[job is not None].spend():
            return
        detail: dict[str, Any] = {"code": error.code}
        if job is not None:
            detail["claims"] = publishers.claims_of(job)
        with self.resources.write() as session:
            namespace = repository.namespace
            audit.record(
                session, actor, Act.TOKEN_REFUSE, repository, namespace=namespace, reason=error.detail, **detail
            )


def parse_publisher(settings: Settings, new: NewPublisher) -> NewPublisher:
    """The rule, with the issuer's address in place of its short name. Raises Invalid for a rule that no
    job could meet."""
    issuer = next((url for url, layout in settings.issuers.items() if layout == new.issuer != "other"), new.issuer)
    if issuer not in settings.issuers:
        raise Invalid(
            "issuer_unknown",
            f"This registry does not accept the issuer {shown(new.issuer)}.",
            subject=shown(new.issuer),
            next_step=f"ADAPTORY_OIDC_ISSUERS of the server lists {', '.join(settings.issuers) or 'none'}.",
        )
    rule = replace(new, issuer=issuer)
    if settings.issuers[issuer] == "github" and rule.workflow is not None and "/" not in rule.workflow:
        rule = replace(rule, workflow=f".github/workflows/{rule.workflow}")
    texts = [rule.project, rule.project_id, rule.ref, rule.environment, rule.workflow]
    texts = [text for text in texts if text is not None]
    if not all(text and text.isprintable() and text == text.strip() for text in texts):
        raise bad_publisher("a value is empty, or has spaces around it or unprintable characters")
    if "*" in rule.project or "*" in (rule.workflow or ""):
        raise bad_publisher("a * is allowed only at the end of a ref; add each project separately")
    if len(job_name(issuer, rule.project)) > MAX_USER:
        raise bad_publisher("the name of the project is too long")
    if rule.ref is not None and "*" in rule.ref.removesuffix("*"):
        raise bad_publisher("its ref has a * that is not at the end")
    _check_of_issuer(rule, settings.issuers[issuer])
    return rule


def _check_of_issuer(rule: NewPublisher, layout: Claims) -> None:
    """Raises Invalid for fields that the issuer's tokens never have, or if a required one is missing."""
    named = layout != "other"
    if named and rule.ref is not None and not rule.ref.startswith(("refs/heads/", "refs/tags/")):
        raise bad_publisher("its ref begins with neither refs/heads/ nor refs/tags/")
    if named and not re.fullmatch(r"[^/\s]+(/[^/\s]+)+", rule.project):
        raise bad_publisher("its project is not written as OWNER/NAME")
    if layout == "github" and rule.workflow is None:
        raise bad_publisher("it names no workflow, so every workflow of the project could publish")
    if not named and rule.workflow is not None:
        raise bad_publisher("its issuer's tokens do not name a workflow; only GitHub's and GitLab's do")
    if rule.project_id is not None and not (named and re.fullmatch(r"[0-9]{1,20}", rule.project_id)):
        raise bad_publisher(
            "its project has another kind of id: GitHub's and GitLab's are numbers, other issuers have none"
        )
