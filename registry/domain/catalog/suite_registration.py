"""Registers suites, and shares those of namespaces."""

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from composer.formats.recipes.elsewhere import ReportedBenchmark, SuiteContent
from registry.database.engine import insert_if_absent
from registry.database.tables import SuiteVersion
from registry.domain.access import audit
from registry.domain.access.audit import Act, Actor
from registry.domain.access.roles import EVERYWHERE, Role, holds, namespaces_of, permit, refuse_other_owner
from registry.domain.catalog import metrics
from registry.domain.catalog.suites import ELSEWHERE, REPORTED, find_any, find_readable
from registry.errors import Conflict, NotAllowed, Usage
from registry.formats.references import parse_name

REPORTED_PREFIX = f"{REPORTED}-"


def add(session: Session, actor: Actor, content: SuiteContent) -> tuple[SuiteVersion, bool]:
    """Adds a suite. Returns it and whether it is new. The content added last, even if known, becomes current. Its
    statements about metrics hold for all contents of its name.

    A version labels one content: raises Conflict if another content has it, or this content another one. A suite with
    examples and a task of a harness do not replace each other.
    """
    namespace = _permit(session, actor, content.name)
    known = session.scalar(select(SuiteVersion).where(SuiteVersion.digest == content.digest))
    _refuse_other_label(session, content, known)
    _refuse_other_origin(session, content)
    if known is not None and content.version and known.version is None:
        _refuse_other_owner(actor, known)
        known.version = content.version
    if known is not None and known.current:
        if content.higher_is_better.items() - metrics.stated(session, [known])[known.name].items():
            _refuse_other_owner(actor, known)
            metrics.state(session, actor, content.name, content.higher_is_better)
        return known, False
    replaced = find_any(session, content.name)
    if replaced is not None:
        _refuse_other_owner(actor, replaced)
    session.execute(update(SuiteVersion).where(SuiteVersion.name == content.name).values(current=False))
    suite = known or SuiteVersion(
        name=content.name,
        namespace=namespace,
        digest=content.digest,
        version=content.version,
        kind=content.kind,
        task=content.task,
        examples=content.count,
        content=content.content,
        created_at=actor.at,
        created_by=actor.name,
    )
    suite.current, suite.shared = True, replaced.shared if replaced else namespace is None
    session.add(suite)
    session.flush()
    metrics.state(session, actor, content.name, content.higher_is_better)
    audit.record(
        session,
        actor,
        Act.SUITE_ADD,
        f"suite/{content.name}",
        namespace=namespace,
        before=_labels(replaced) if replaced else None,
        after={**_labels(suite), "examples": content.count},
    )
    return suite, known is None


def _labels(suite: SuiteVersion) -> dict[str, str]:
    return {"digest": suite.digest, **({"version": suite.version} if suite.version else {})}


def _permit(session: Session, actor: Actor, name: str) -> str | None:
    """The namespace of a suite to add, in which the actor publishes. Names without one are for all: new ones need the
    role in the whole registry. Raises Conflict for a reserved name."""
    namespace, slash, own = name.rpartition("/")
    parse_name(own, "suite name")
    _refuse_reserved(name)
    if slash:
        permit(actor, Role.PUBLISHER, parse_name(namespace, "namespace"))
        return namespace
    if find_any(session, name) is None and not holds(actor, Role.PUBLISHER):
        mine = next((each for each in namespaces_of(actor) if holds(actor, Role.PUBLISHER, each)), "NAMESPACE")
        raise NotAllowed(
            "suite_namespace",
            f"{name} names no namespace, so every member of the registry could read its examples.",
            subject=name,
            next_step=f"Name it {mine}/{name}. `adaptory suite share {mine}/{name}` then lets all read it.",
        )
    return None


def _refuse_other_owner(actor: Actor, suite: SuiteVersion) -> None:
    refuse_other_owner(actor, f"suite/{suite.name}", suite.created_by, namespace=suite.namespace or EVERYWHERE)


def share(session: Session, actor: Actor, named: str, *, shared: bool) -> SuiteVersion:
    """Lets every member of the registry read a namespace's suite, or only those who may read there. For its author, as
    long as that is a publisher there, and admins of the namespace."""
    suite = find_readable(session, named, actor)
    if suite.namespace is None:
        raise Usage(
            "suite_shared",
            f"{suite.name} belongs to no namespace: all may read it.",
            subject=suite.name,
        )
    permit(actor, Role.PUBLISHER, suite.namespace)
    _refuse_other_owner(actor, suite)
    if suite.shared != shared:
        session.execute(update(SuiteVersion).where(SuiteVersion.name == suite.name).values(shared=shared))
        session.refresh(suite)
        before, after = {"shared": not shared}, {"shared": shared}
        subject = f"suite/{suite.name}"
        audit.record(session, actor, Act.SUITE_SHARE, subject, namespace=suite.namespace, before=before, after=after)
    return suite


def _refuse_reserved(name: str) -> None:
    """Raises Conflict for reserved names: whether one is taken would reveal what private releases report."""
    if name.startswith(REPORTED_PREFIX):
        raise Conflict(
            "suite_name_taken",
            f"Names that begin with {REPORTED_PREFIX} are reserved for benchmarks whose scores are only reported.",
            subject=name,
        )


def _refuse_other_label(session: Session, content: SuiteContent, known: SuiteVersion | None) -> None:
    if content.version is None:
        return
    query = select(SuiteVersion).where(SuiteVersion.name == content.name, SuiteVersion.version == content.version)
    labelled = session.scalar(query)
    if labelled is not None and labelled.digest != content.digest:
        raise Conflict(
            "suite_version_taken",
            f"{content.name}@{content.version} already labels different content ({labelled.digest[:12]}).",
            subject=f"{content.name}@{content.version}",
        )
    if known is not None and known.version not in (None, content.version):
        raise Conflict(
            "suite_version_differs",
            f"This content is already {content.name}@{known.version}.",
            subject=f"{content.name}@{content.version}",
            next_step=f"Write `version: {known.version}`, or leave it out.",
        )


def _refuse_other_origin(session: Session, content: SuiteContent) -> None:
    """Refuses to replace a suite by a harness task of the same name, since gates would lose its scores."""
    replaced = session.scalar(select(SuiteVersion).where(SuiteVersion.name == content.name, SuiteVersion.current))
    if replaced is None or ELSEWHERE.get(replaced.task) == ELSEWHERE.get(content.task):
        return
    raise Conflict(
        "suite_name_taken",
        f"{content.name} is {ELSEWHERE.get(replaced.task, 'a suite with examples')}, registered by "
        f"{replaced.created_by}.",
        subject=content.name,
    )


def add_reported(session: Session, actor: Actor, benchmark: ReportedBenchmark) -> SuiteVersion:
    """The suite for the reported scores of a benchmark; it has no owner. Raises Conflict if its name is taken."""
    added = insert_if_absent(
        session,
        SuiteVersion,
        name=benchmark.name,
        digest=benchmark.digest,
        kind="target",
        task=REPORTED,
        examples=0,
        content=benchmark.content,
        current=True,
        created_at=actor.at,
        created_by=actor.name,
    )
    suite = find_any(session, benchmark.digest)
    if suite is None:
        raise Conflict(
            "suite_name_taken",
            f"{benchmark.name} is the name of another suite.",
            subject=benchmark.name,
            next_step="Give the data set its full name, as in owner/name.",
        )
    if added:
        after = {"digest": benchmark.digest, "examples": 0}
        audit.record(session, actor, Act.SUITE_ADD, f"suite/{benchmark.name}", namespace=None, after=after)
    return suite
