"""Attestations of workers: their keys, the attestations of a release, and its evidence for the check of servers."""

from fastapi import APIRouter

from registry.api.http.pagination import Cursor, Limit, decode_cursor, page
from registry.api.http.request import ResourcesOf
from registry.api.http.routes import Route
from registry.api.http.rules import Caller, Member, Reader, RegistryAdmin
from registry.api.routes.repository import NamedRepository, RepositoryOf, RepositoryRouter
from registry.database.engine import Session
from registry.database.tables import Attestation, WorkerKey
from registry.domain.access import worker_keys
from registry.domain.access.audit import Actor
from registry.domain.access.roles import Role, holds, namespaces_of, permit, permit_somewhere
from registry.domain.catalog import attestations, suites
from registry.wire.document import Page
from registry.wire.quality import AttestationOut, AttestationsOut, WorkerKeyOut

router = APIRouter(prefix="/v1", tags=["operations"], route_class=Route)
repository_routes = RepositoryRouter(tags=["releases"], route_class=Route)


@router.get("/worker-keys")
def list_worker_keys(
    resources: ResourcesOf, actor: Member, limit: Limit = 50, cursor: Cursor = None
) -> Page[WorkerKeyOut]:
    """List the public keys by which workers attest what they measure, revoked ones included."""
    with resources.read() as session:
        after = decode_cursor(cursor)
        rows = worker_keys.list_page(session, after=after, limit=limit + 1)
        return page([_key_view(row) for row in rows], limit, [row.id for row in rows])


@router.delete("/worker-keys/{key}")
def revoke_worker_key(key: str, resources: ResourcesOf, actor: RegistryAdmin) -> WorkerKeyOut:
    """Revoke a worker's key, by its id or the first digits of it. What it signed counts as stated from then on, and the
    worker that has it measures nothing further."""
    with resources.write() as session:
        return _key_view(worker_keys.revoke(session, actor, key))


@repository_routes.get("/{namespace}/{name}/releases/{version}/attestations")
def list_attestations(named: RepositoryOf, version: str, resources: ResourcesOf, actor: Reader) -> AttestationsOut:
    """List what workers attested of a release: its scores, its lineage if a worker composed it, and its evidence for
    those who may read that. Keys that were revoked are included."""
    with resources.read() as session:
        rows = attestations.of_release(session, named.release(session, version))
        readable = [row for row in rows if _may_read(session, actor, named, row)]
        return AttestationsOut(attestations=list(map(_view, readable)))


@repository_routes.get("/{namespace}/{name}/releases/{version}/evidence")
def show_evidence(named: RepositoryOf, version: str, resources: ResourcesOf, actor: Caller) -> AttestationOut:
    """Show the evidence by which a server's answers are compared with the release: token ids of up to 8 examples, and
    their log-probabilities under the release and its base. For readers of the suite and for agents of the namespace."""
    permit(actor, Role.READER, str(named.name))
    if not holds(actor, Role.AGENT, str(named.name)):
        permit_somewhere(actor, Role.READER)
    with resources.read() as session:
        row = attestations.evidence_of(session, named.release(session, version))
        if not _may_read(session, actor, named, row):
            raise suites.not_shared(attestations.suite_of(session, row))
        return _view(row)


def _may_read(session: Session, actor: Actor, named: NamedRepository, row: Attestation) -> bool:
    """Evidence has token ids of the suite: it is for agents of the namespace, and for members of the registry who may
    read the suite."""
    if attestations.KINDS.get(row.predicate_type) != "evidence" or holds(actor, Role.AGENT, str(named.name)):
        return True
    is_member = any(holds(actor, Role.READER, namespace) for namespace in namespaces_of(actor))
    return is_member and suites.may_read(actor, attestations.suite_of(session, row))


def _view(row: Attestation) -> AttestationOut:
    return AttestationOut.of(
        row, kind=attestations.KINDS.get(row.predicate_type, "other"), key=_key_view(row.key), envelope=row.envelope
    )


def _key_view(row: WorkerKey) -> WorkerKeyOut:
    return WorkerKeyOut.of(row)
