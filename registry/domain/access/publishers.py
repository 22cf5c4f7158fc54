"""Trusted publishers: rules by which a job of continuous integration gets a token for one repository, for an hour.

The job proves its identity with an ID token of its issuer, which the caller has verified. Admins of the namespace add
rules, also before the repository exists; removing a rule ends its tokens.
"""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from registry.database.tables import Token, TrustedPublisher
from registry.domain.access import audit, namespaces, tokens
from registry.domain.access.audit import Act, Actor
from registry.domain.access.roles import Role
from registry.domain.access.tokens import NewToken
from registry.errors import Invalid, NotAllowed, NotFound
from registry.formats.id_tokens import CiJob
from registry.formats.references import RepositoryName

LIFETIME = timedelta(hours=1)
MAX_PUBLISHERS = 50
"""Of one repository."""
_KEPT = timedelta(days=7)
"""How long the row of an expired token of a job stays; the audit log names it longer."""
MAX_USER = 128
_MAX_NAME = 100
_SHORT = {"https://token.actions.githubusercontent.com": "github", "https://gitlab.com": "gitlab"}


@dataclass(frozen=True, slots=True)
class NewPublisher:
    """A rule. `ref` is compared completely, or up to a `*` at its end; None allows any, as in `environment` and
    `workflow`, the path of the job's file in its project."""

    issuer: str
    project: str
    project_id: str | None
    ref: str | None
    environment: str | None
    workflow: str | None = None


@dataclass(frozen=True, slots=True)
class Assertion:
    """A verified ID token: its job, its identity, and the time until which it must be remembered."""

    job: CiJob
    replay_key: str
    expires_at: datetime


def add(session: Session, actor: Actor, repository: RepositoryName, new: NewPublisher) -> tuple[TrustedPublisher, bool]:
    """Adds a rule. Returns it, and whether it is new: adding it again changes nothing. Raises Invalid for a rule that
    any job of the project would meet, including jobs on pull requests and on any branch.
    """
    namespaces.find_for_share(session, repository.namespace)
    if new.ref is None and new.environment is None:
        raise bad_publisher("it names neither a ref nor an environment, so every job of the project could publish")
    if new.environment is None and new.ref is not None and _is_any_branch(new.ref):
        raise bad_publisher(
            f"its ref {new.ref} matches every branch, which anyone who may push can make; name an environment"
        )
    rows = list_of(session, repository)
    for row in rows:
        same = replace(new, project_id=None) == NewPublisher(
            row.issuer, row.project, None, row.ref, row.environment, row.workflow
        )
        if same and new.project_id in (None, row.project_id):
            return row, False
    if len(rows) >= MAX_PUBLISHERS:
        raise bad_publisher(f"{repository} has {MAX_PUBLISHERS} trusted publishers, the most there may be")
    row = TrustedPublisher(
        id=tokens.random_id(),
        namespace=repository.namespace,
        repository=repository.name,
        **asdict(new),
        created_at=actor.at,
        created_by=actor.name,
    )
    session.add(row)
    session.flush()
    audit.record(
        session,
        actor,
        Act.PUBLISHER_ADD,
        repository,
        namespace=repository.namespace,
        after=_rule(row),
        publisher=row.id,
    )
    return row, True


def list_of(session: Session, repository: RepositoryName) -> list[TrustedPublisher]:
    """A repository's rules, oldest first."""
    query = select(TrustedPublisher).where(
        TrustedPublisher.namespace == repository.namespace, TrustedPublisher.repository == repository.name
    )
    return list(session.scalars(query.order_by(TrustedPublisher.created_at, TrustedPublisher.id)))


def list_in(session: Session, namespace: str) -> list[TrustedPublisher]:
    """The rules of all repositories of a namespace, oldest first."""
    query = select(TrustedPublisher).where(TrustedPublisher.namespace == namespace)
    return list(session.scalars(query.order_by(TrustedPublisher.created_at, TrustedPublisher.id)))


def without_workflow(session: Session, issuers: Collection[str]) -> list[TrustedPublisher]:
    """The rules for these issuers that allow every workflow, as all did before migration 0022."""
    query = select(TrustedPublisher).where(TrustedPublisher.workflow.is_(None), TrustedPublisher.issuer.in_(issuers))
    return list(session.scalars(query.order_by(TrustedPublisher.namespace, TrustedPublisher.repository)))


def remove(session: Session, actor: Actor, repository: RepositoryName, publisher_id: str) -> TrustedPublisher:
    """Removes a rule, and thereby ends its tokens. Raises NotFound."""
    row = session.get(TrustedPublisher, publisher_id, with_for_update=True)
    if row is None or (row.namespace, row.repository) != (repository.namespace, repository.name):
        raise NotFound(
            "publisher_unknown",
            f"{repository} has no trusted publisher {publisher_id[:16]}.",
            subject=publisher_id[:16],
            next_step=f"`adaptory publisher list {repository}` shows them.",
        )
    session.delete(row)
    session.flush()
    audit.record(
        session,
        actor,
        Act.PUBLISHER_REMOVE,
        repository,
        namespace=repository.namespace,
        before=_rule(row),
        publisher=row.id,
    )
    return row


def uses(session: Session, issuer: str) -> bool:
    """Whether a rule names the issuer."""
    query = select(TrustedPublisher.id).where(TrustedPublisher.issuer == issuer).limit(1)
    return session.scalar(query) is not None


def exchange(session: Session, actor: Actor, repository: RepositoryName, assertion: Assertion) -> tuple[Token, str]:
    """Gives a job a token for the repository. Returns it and its secret text, which is not stored.

    Raises NotAllowed if no rule of the repository allows the job, and Unauthenticated for an ID token that was
    exchanged before. A refused token can be sent again.
    """
    # Jobs' tokens that expired long ago go.
    old = (Token.expires_at < actor.at - _KEPT) & Token.publisher_id.is_not(None)
    session.execute(delete(Token).where(old))
    job = assertion.job
    row = _matching(session, repository, job)
    tokens.use_once(session, assertion.replay_key, assertion.expires_at, actor.at)
    if row.project_id is None:
        row.project_id = job.project_id
    new = NewToken(actor.name, f"{job.project} {job.ref or ''}".strip()[:_MAX_NAME], {}, LIFETIME)
    scope = {repository.namespace: Role.READER.value, str(repository): Role.PUBLISHER.value}
    token, text = tokens.add(session, actor, new, scope, row.id)
    detail: dict[str, Any] = {"token": token.id, "publisher": row.id, "claims": claims_of(job)}
    audit.record(session, actor, Act.TOKEN_EXCHANGE, repository, namespace=repository.namespace, **detail)
    return token, text


def job_name(issuer: str, project: str) -> str:
    """The user name of a project's jobs, such as github/acme/training. No other user's name has a slash."""
    return f"{_SHORT.get(issuer, issuer.partition('//')[2])}/{project}"


def claims_of(job: CiJob) -> Mapping[str, str | None]:
    """The description of a job in an audit row."""
    return {
        "issuer": job.issuer,
        "project": job.project,
        "project_id": job.project_id,
        "ref": job.ref,
        "environment": job.environment,
        "workflow": job.workflow,
        **job.details,
    }


def _matching(session: Session, repository: RepositoryName, job: CiJob) -> TrustedPublisher:
    """The rule that allows the job, locked. Raises NotAllowed."""
    renamed = False
    for row in list_of(session, repository):
        if not _allows(row, job):
            continue
        # Waits for another first exchange, and for a removal.
        locked = session.get(TrustedPublisher, row.id, with_for_update=True, populate_existing=True)
        if locked is not None and locked.project_id in (None, job.project_id):
            return locked
        renamed = locked is not None
    described = (
        f"{job.project}, workflow {job.workflow or 'none'}, ref {job.ref or 'none'}, "
        f"environment {job.environment or 'none'}"
    )
    what = (
        f"its number {job.project_id} differs from that of the project of this name that was trusted"
        if renamed
        else described
    )
    raise NotAllowed(
        "publisher_refused",
        f"No trusted publisher of {repository} matches this job: {what}.",
        subject=str(repository),
        next_step=f"Ask an admin of {repository.namespace} to add it: `adaptory publisher add {repository} …`.",
    )


def _is_any_branch(ref: str) -> bool:
    return ref.endswith("*") and "refs/heads/".startswith(ref.removesuffix("*"))


def _allows(row: TrustedPublisher, job: CiJob) -> bool:
    if row.ref is None or job.ref is None:
        same_ref = row.ref is None
    elif row.ref.endswith("*"):
        same_ref = job.ref.startswith(row.ref.removesuffix("*"))
    else:
        same_ref = job.ref == row.ref
    same_project = (row.issuer, row.project) == (job.issuer, job.project)
    same_job = row.environment in (None, job.environment) and row.workflow in (None, job.workflow)
    return same_project and same_ref and same_job


def _rule(row: TrustedPublisher) -> dict[str, str | None]:
    return {field.name: getattr(row, field.name) for field in fields(NewPublisher)}


def bad_publisher(why: str) -> Invalid:
    return Invalid("bad_publisher", f"The trusted publisher cannot be added: {why}.")
