"""Repositories and their releases. The same routes serve adapters and models."""

from collections.abc import Callable
from functools import partial

from fastapi import Request, Response

from registry.api.http.pagination import Cursor, Limit, decode_cursor, decode_number, encode_cursor, page
from registry.api.http.request import RequestKey, ResourcesOf, idempotent_request
from registry.api.http.routes import Route
from registry.api.http.rules import Admin, Caller, Publisher, Reader, Releaser
from registry.api.http.threads import in_store_threads
from registry.api.routes.blobs import BYTES, ByteRange, file_response, record_download
from registry.api.routes.documents import page_response, release_documents, release_view
from registry.api.routes.repository import KindOf, NamedRepository, RepositoryOf, RepositoryRouter
from registry.api.routes.views import repository_page
from registry.database.engine import Session
from registry.database.tables import Release
from registry.domain.access import namespaces
from registry.domain.access.audit import Actor
from registry.domain.access.roles import Role, permit
from registry.domain.catalog import deprecations, lineage, releases, repositories, set_members, signatures
from registry.domain.catalog.repositories import RepositoryFilter
from registry.domain.channels import withdrawals
from registry.domain.channels.serving import ServedChange
from registry.domain.rollouts import fleet
from registry.formats.manifest import ManifestFile
from registry.formats.references import parse_digest, parse_name, parse_version
from registry.transfer.resources import Resources
from registry.wire.catalog import (
    DeprecateIn,
    DescendantOut,
    LoadedOnOut,
    NextOut,
    PublishedOut,
    ReleaseIn,
    ReleaseOut,
    RepositoryOut,
    ServedChangeOut,
    ServingSetOut,
    SignatureIn,
    SignatureOut,
    SignaturesOut,
    SpectrumOut,
    TakedownOut,
    TargetSuiteOut,
    WithdrawIn,
    WithdrawnOut,
)
from registry.wire.document import Page

repository_routes = RepositoryRouter(tags=["releases"], route_class=Route)
"""Mounted once under /v1/adapters and once under /v1/models."""


@repository_routes.get("")
def list_repositories(
    kind: KindOf,
    resources: ResourcesOf,
    actor: Caller,
    namespace: str | None = None,
    limit: Limit = 50,
    cursor: Cursor = None,
) -> Page[RepositoryOut]:
    """List the repositories that the caller may read, optionally of one namespace."""
    if namespace is not None:
        permit(actor, Role.READER, parse_name(namespace, "namespace"))
    wanted = RepositoryFilter([kind], namespace)
    with resources.snapshot() as session:
        if namespace is not None:
            namespaces.find(session, namespace)
        rows = repositories.list_page(session, actor, wanted, after=decode_cursor(cursor), limit=limit + 1)
        return page(repository_page(session, rows), limit, [str(repositories.name_of(row)) for row in rows])


@repository_routes.get("/{namespace}/{name}")
def show_repository(named: RepositoryOf, resources: ResourcesOf, actor: Reader) -> RepositoryOut:
    with resources.snapshot() as session:
        return repository_page(session, [named.find(session)])[0]


@repository_routes.post("/{namespace}/{name}/releases", status_code=201, responses={200: {"model": PublishedOut}})
@in_store_threads
def publish(  # noqa: PLR0913
    named: RepositoryOf,
    body: ReleaseIn,
    resources: ResourcesOf,
    actor: Publisher,
    request: Request,
    response: Response,
    key: RequestKey = None,
) -> PublishedOut:
    """201 for a new release; 200 if the same was published already; 409 for different content under the version."""
    if body.allow_breaking is not None:
        permit(actor, Role.RELEASER, named.name.namespace)
    files = [ManifestFile(row.path, row.size_bytes, parse_digest(row.sha256)) for row in body.files]
    version = parse_version(body.version) if body.version else None
    from registry.transfer import publishing  # imports the adapter inspection, which only publishing needs

    push = publishing.Push(
        repository=named.name,
        kind=named.kind,
        version=version,
        bump=body.bump,
        base=body.base,
        files=files,
        notes=body.notes,
        allow_breaking=body.allow_breaking,
        provenance=body.provenance.model_dump(exclude_unset=True) if body.provenance else {},
        strict=body.strict,
    )
    published = publishing.publish(resources, actor, push, idempotent_request(request, actor, key, body))
    response.status_code = 201 if published.created else 200
    with resources.read() as session:
        view = release_view(session, actor, session.get_one(Release, published.release_id))
        return PublishedOut(release=view, created=published.created, warnings=published.warnings)


@repository_routes.post("/{namespace}/{name}/next-version")
@in_store_threads
def next_version(named: RepositoryOf, body: ReleaseIn, resources: ResourcesOf, actor: Publisher) -> NextOut:
    """The version that a release of these files would get now by `bump`; a signature must name it."""
    files = [ManifestFile(row.path, row.size_bytes, parse_digest(row.sha256)) for row in body.files]
    from registry.transfer import publishing

    push = publishing.Push(
        repository=named.name, kind=named.kind, version=None, bump=body.bump, base=body.base, files=files
    )
    return NextOut(version=str(publishing.next_version(resources, push)))


@repository_routes.get("/{namespace}/{name}/releases", response_model=Page[ReleaseOut])
def list_releases(
    named: RepositoryOf, resources: ResourcesOf, actor: Reader, limit: Limit = 50, cursor: Cursor = None
) -> Response:
    """List releases, highest version first."""
    with resources.read() as session:
        repository = named.find(session)
        rows = releases.list_page(session, repository, before=decode_cursor(cursor), limit=limit + 1)
        items = release_documents(session, actor, [row.id for row in rows[:limit]])
    return page_response(items, encode_cursor(rows[len(items) - 1].sort_key) if rows[len(items) :] else None)


@repository_routes.get("/{namespace}/{name}/releases/{version}")
def show_release(named: RepositoryOf, version: str, resources: ResourcesOf, actor: Reader) -> ReleaseOut:
    with resources.read() as session:
        return release_view(session, actor, named.release(session, version))


@repository_routes.get("/{namespace}/{name}/releases/{version}/target-suite")
def show_target_suite(named: RepositoryOf, version: str, resources: ResourcesOf, actor: Reader) -> TargetSuiteOut:
    """The target suite on which the release gained most over its base; probes use it."""
    with resources.read() as session:
        release = named.release(session, version)
        from registry.domain.compositions import locking

        return TargetSuiteOut(target_suite=locking.best_target_suite(session, release))


@repository_routes.get("/{namespace}/{name}/releases/{version}/descendants")
def list_descendants(
    named: RepositoryOf,
    version: str,
    resources: ResourcesOf,
    actor: Reader,
    limit: Limit = 50,
    cursor: Cursor = None,
) -> Page[DescendantOut]:
    """List the releases that were composed from this one, newest first; without those that the caller may not read."""
    with resources.snapshot() as session:
        release = named.release(session, version)
        rows = lineage.descendants(session, actor, release, before=decode_number(cursor), limit=limit + 1)
        items = [DescendantOut.of(row) for row in rows]
        return page(items, limit, [row.id for row in rows])


@repository_routes.get("/{namespace}/{name}/releases/{version}/spectrum")
def show_spectrum(named: RepositoryOf, version: str, resources: ResourcesOf, actor: Reader) -> SpectrumOut:
    """The share of its rank that each module uses; 404 if not computed, as for merged models."""
    with resources.read() as session:
        return SpectrumOut(**releases.spectrum_of(session, named.name, parse_version(version), named.kind))


@repository_routes.get(
    "/{namespace}/{name}/releases/{version}/files/{path:path}", response_class=Response, responses=BYTES
)
@in_store_threads
def download_file(  # noqa: PLR0913
    named: RepositoryOf,
    version: str,
    path: str,
    request: Request,
    resources: ResourcesOf,
    actor: Reader,
    byte_range: ByteRange = None,
) -> Response:
    with resources.read() as session:
        file = releases.find_file(session, named.release(session, version), path)
    record_download(resources, actor, f"{named.name}:{version}", path)
    return file_response(request, resources, file, f"{path} of {named.name}:{version}", byte_range)


@repository_routes.post("/{namespace}/{name}/releases/{version}/signatures")
def sign(named: RepositoryOf, version: str, body: SignatureIn, resources: ResourcesOf, actor: Publisher) -> ReleaseOut:
    """Add a signature, by a key of the namespace, to a published release. Only for its publisher and admins."""
    target = (named.name, parse_version(version), named.kind)
    from registry.transfer import publishing

    release_id = publishing.add_signature(resources, actor, target, body.bundle.encode())
    with resources.read() as session:
        return release_view(session, actor, session.get_one(Release, release_id))


@repository_routes.get("/{namespace}/{name}/releases/{version}/signatures")
def list_signatures(named: RepositoryOf, version: str, resources: ResourcesOf, actor: Reader) -> SignaturesOut:
    with resources.read() as session:
        rows = signatures.of_release(session, named.release(session, version))
        return SignaturesOut(signatures=[SignatureOut.of(row) for row in rows])


@repository_routes.post("/{namespace}/{name}/releases/{version}/deprecate")
def deprecate(
    named: RepositoryOf, version: str, body: DeprecateIn, resources: ResourcesOf, actor: Releaser
) -> ReleaseOut:
    """Deprecate a release, or undo that with a null reason. It is shown wherever the release is, and blocks nothing."""
    with resources.write() as session:
        release = named.release(session, version)
        deprecations.deprecate(session, actor, release, body.reason, body.successor)
        return release_view(session, actor, release)


@repository_routes.post("/{namespace}/{name}/releases/{version}/yank")
def yank(named: RepositoryOf, version: str, body: WithdrawIn, resources: ResourcesOf, actor: Releaser) -> WithdrawnOut:
    """Yank a release. `channels` are those that serve another release now; with `dry_run`, that would."""
    return _withdraw(resources, actor, named, version, body, withdrawals.yank)


@repository_routes.post("/{namespace}/{name}/releases/{version}/unyank")
def unyank(
    named: RepositoryOf, version: str, body: WithdrawIn, resources: ResourcesOf, actor: Releaser
) -> WithdrawnOut:
    """Undo a yank. `channels` are those that serve another release now; with `dry_run`, that would."""
    return _withdraw(resources, actor, named, version, body, withdrawals.unyank)


def _withdraw(
    resources: Resources,
    actor: Actor,
    named: NamedRepository,
    version: str,
    body: WithdrawIn,
    change: Callable[[Session, Actor, Release, str], list[ServedChange]],
) -> WithdrawnOut:
    with resources.write() as session:
        release = named.release(session, version)
        act = partial(change, session, actor, release, body.reason)
        changes = [
            ServedChangeOut.of(served) for served in (withdrawals.preview(session, act) if body.dry_run else act())
        ]
        return WithdrawnOut(
            **dict(release_view(session, actor, release)),
            channels=changes,
            loaded_on=_loaded_on(session, actor, release),
            sets=[ServingSetOut.of(row) for row in set_members.sets_with(session, actor, release)],
        )


def _loaded_on(session: Session, actor: Actor, release: Release) -> list[LoadedOnOut]:
    return [LoadedOnOut.of(node) for node in fleet.loaded_on(session, release, actor.at)]


@repository_routes.post("/{namespace}/{name}/releases/{version}/takedown")
def take_down(named: RepositoryOf, version: str, body: WithdrawIn, resources: ResourcesOf, actor: Admin) -> TakedownOut:
    """Remove the files of a release, and of versions with the same ones, for good. A tombstone stays. With `dry_run`,
    only say what would be removed."""
    with resources.write() as session:
        release = named.release(session, version)
        if body.dry_run:
            trial = partial(withdrawals.remove_files, session, actor, release, body.reason)
            taken = withdrawals.preview(session, trial)
        else:
            taken = withdrawals.take_down(session, actor, release, body.reason)
        loaded = _loaded_on(session, actor, release)
        sets = [ServingSetOut.of(row) for row in set_members.sets_with(session, actor, release, same_files=True)]
    from registry.transfer.collect import remove_marked  # which loads more than all other routes here need

    if not body.dry_run:
        remove_marked(resources)
    return TakedownOut.of(taken, loaded_on=loaded, sets=sets)
