"""Writes by clients of the hub: repositories, commits, and tags, which are releases."""

from functools import partial
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from registry.api.http.problems import header_text
from registry.api.http.request import ResourcesOf, body_chunks, content_length, receive_body, refuse_longer
from registry.api.http.rules import PUBLISHES, Caller, Publisher, Reader, Releaser
from registry.api.http.threads import in_store_threads
from registry.api.hub.models import MODEL
from registry.api.hub.wire import CREATE, HubRoute, with_findings
from registry.database.tables import Promotion
from registry.domain.access.audit import Actor
from registry.domain.access.roles import Role, may, permit
from registry.domain.catalog import commits, repositories
from registry.domain.channels import moves, promotions, revisions
from registry.domain.channels.revisions import MAIN
from registry.errors import Conflict, NotAllowed, NotFound, Stale, Usage
from registry.formats.manifest import MAX_FILES, ManifestFile, is_trainer_file, parse_manifest
from registry.formats.references import RepositoryName, parse_digest, parse_name, parse_repository, parse_version
from registry.formats.xet import has_lz4
from registry.transfer import lfs, uploads
from registry.transfer.resources import Resources


# The requests of the client; it adds fields that are not used here.
class RepositoryIn(BaseModel):
    name: str
    organization: str | None = None
    type: str | None = None
    private: bool | None = None
    visibility: str | None = None


class MoveIn(BaseModel):
    fromRepo: str  # noqa: N815


class PlannedFile(BaseModel):
    path: str
    size: int = Field(ge=0)


class PlanIn(BaseModel):
    files: list[PlannedFile] = Field(default=[], max_length=MAX_FILES)


class LfsObject(BaseModel):
    oid: str
    size: int = Field(ge=0)


class BatchIn(BaseModel):
    objects: list[LfsObject] = Field(default=[], max_length=MAX_FILES)
    transfers: list[str] = ["basic"]


class TagIn(BaseModel):
    tag: str
    message: str | None = None


class BranchIn(BaseModel):
    startingPoint: str | None = None  # noqa: N815


router = APIRouter(route_class=HubRoute)
INLINE_BYTES = 1 << 20
"""The size up to which a file is sent inside the commit."""
MAX_COMMIT_BYTES = 400 << 20


@router.post(CREATE)
def create(body: RepositoryIn, request: Request, resources: ResourcesOf, actor: Caller) -> Response:
    """Creates an empty repository. Its name is lower-cased, since trainers derive it from a directory."""
    if body.type not in (None, "model"):
        raise _not_a_model(body.type)
    if not body.organization and not may(actor, Role.PUBLISHER, actor.name):
        parse_repository(body.name)  # reports that a namespace is missing
    namespace = (body.organization or actor.name).lower()
    repository = RepositoryName(parse_name(namespace, "namespace"), parse_name(body.name.lower(), "repository name"))
    permit(actor, Role.PUBLISHER, str(repository))
    if (body.private or body.visibility == "private") and namespace in actor.public:
        raise NotAllowed(
            "namespace_public",
            f"The namespace {namespace} is public, and so is everything in it.",
            subject=namespace,
            next_step="Leave private=True out, or use a private namespace.",
        )
    with resources.write() as session:
        created = commits.create_repository(session, actor, repository)
    document = {"url": f"{request.base_url}{repository}", "name": str(repository), "id": str(repository)}
    if created:
        visible = body.private is False or body.visibility == "public"
        stays = visible and namespace not in actor.public
        warning = {"X-HF-Warning": f"private; {repository} is private, as everything in {namespace}."} if stays else {}
        return JSONResponse(document, headers=warning)
    error = f"{repository} exists already."
    return JSONResponse({**document, "error": error}, 409, headers={"X-Error-Message": error})


@router.post("/api/validate-yaml")
def validate_card() -> Response:
    """Cards are read when a release is made; their faults are warnings."""
    return JSONResponse({"errors": [], "warnings": []})


@router.post("/api" + MODEL + "/preupload/{revision:path}")
@in_store_threads
def plan_commit(
    namespace: str, name: str, revision: str, body: PlanIn, resources: ResourcesOf, actor: Publisher
) -> Response:
    """Plans whether each file is sent in the commit, before it or not at all, and shows the file of that name in
    `main`. Refuses names before any byte is sent.
    """
    with resources.snapshot() as session:
        repository = parse_repository(f"{namespace}/{name}")
        revisions.refuse_no_branch(session, repository, revision)
        located = revisions.start_of_commit(session, repository)
    kept_here = (".gitattributes", ".gitignore")  # trainers and git keep these files for themselves
    left_out = [file.path for file in body.files if is_trainer_file(file.path) or file.path in kept_here]
    for file in body.files:
        if file.path not in left_out:
            commits.refuse_name(file.path)
            uploads.check_size(resources, file.path, file.size)  # a client with hf_xet would not show a later refusal
    held = {file.path: file for file in parse_manifest(located.manifest)}
    same = [held[file.path] for file in body.files if file.path in held and held[file.path].size_bytes == file.size]
    oids = _oids(resources, [file for file in same if file.path not in left_out])
    files = [
        {
            "path": file.path,
            "uploadMode": "regular" if file.size <= INLINE_BYTES else "lfs",
            "shouldIgnore": file.path in left_out,
            **({"oid": oids[file.path]} if file.path in oids else {}),
        }
        for file in body.files
    ]
    headers = {"X-Repo-Commit": located.commit}
    if left_out:
        headers["X-HF-Warning"] = header_text(f"left-out; Not published: {', '.join(left_out)}.")
    elif not has_lz4() and any(file.size > INLINE_BYTES for file in body.files):  # its refusal would not be shown
        headers["X-HF-Warning"] = "xet; This server lacks the package lz4: push with HF_HUB_DISABLE_XET=1."
    return JSONResponse({"files": files}, headers=headers)


@router.post("/{namespace}/{name}.git/info/lfs/objects/batch")
@in_store_threads
def plan_uploads(
    namespace: str, name: str, body: BatchIn, request: Request, resources: ResourcesOf, actor: Publisher
) -> Response:
    """Plans the upload of files before a commit, to the store or through the API; the addresses are the permission."""
    files = [ManifestFile(file.oid, file.size, parse_digest(file.oid)) for file in body.objects]
    planned = lfs.plan(resources, actor, namespace, files, in_parts="multipart" in body.transfers)
    objects = [_lfs_object(request, file, planned[file.sha256]) for file in files]
    transfer = "multipart" if any(plan and plan.parts for plan in planned.values()) else "basic"
    return JSONResponse({"transfer": transfer, "objects": objects}, media_type="application/vnd.git-lfs+json")


def permit_of(  # noqa: PLR0913
    namespace: str,
    sha256: str,
    act: lfs.PermittedAct,
    expires: int,
    signature: str,
    multipart: str = "",
    token: str = "",
) -> lfs.LfsPermit:
    """The permission in an address. The client sends no token with it."""
    return lfs.LfsPermit(
        act=act,
        namespace=parse_name(namespace, "namespace"),
        sha256=parse_digest(sha256),
        expires=expires,
        multipart_id=multipart,
        token_id=token,
        signature=signature,
    )


PermitOf = Annotated[lfs.LfsPermit, Depends(permit_of)]


def permitted(permit: PermitOf, resources: ResourcesOf) -> lfs.Permitted:
    """The upload of an address, and the user who announced it."""
    return lfs.permitted(resources, permit)


@router.put("/api/lfs/{namespace}/{sha256}")
async def upload(
    upload: Annotated[lfs.Permitted, Depends(permitted)], request: Request, resources: ResourcesOf
) -> Response:
    receive = partial(lfs.receive, resources, upload, body_chunks(request), content_length(request))
    await receive_body(request, upload.actor, receive)
    return Response(status_code=200)


@router.post("/api/lfs/{namespace}/{sha256}")
@in_store_threads
def finish_upload(permit: PermitOf, resources: ResourcesOf) -> Response:
    """Verifies the bytes that the store has received."""
    lfs.finish(resources, permit)
    return JSONResponse({})


@router.post("/api" + MODEL + "/commit/{revision:path}")
async def commit(
    namespace: str, name: str, revision: str, request: Request, resources: ResourcesOf, actor: Publisher
) -> Response:
    from registry.transfer import commits as transfers

    repository = parse_repository(f"{namespace}/{name}")
    if request.query_params.get("create_pr"):
        raise Usage("not_main", "Pull requests are not supported.", next_step="Commit to main.")
    refuse_longer(request, "commit", MAX_COMMIT_BYTES, "Commit fewer files at a time, or use `adaptory push`.")
    receive = partial(transfers.receive, resources, actor, repository, PUBLISHES.chunks(request), revision)
    commit_id, findings = await receive_body(request, actor, receive)
    url = f"{request.base_url}{repository}/commit/{commit_id}"
    response = JSONResponse({"commitOid": commit_id, "commitUrl": url, "success": True})
    return with_findings(response, commit_id, [finding.to_json() for finding in findings])


@router.post("/api" + MODEL + "/tag/{revision:path}")
@in_store_threads
def create_tag(
    namespace: str, name: str, revision: str, body: TagIn, resources: ResourcesOf, actor: Publisher
) -> Response:
    """Publishes the files of a commit as a release."""
    from registry.transfer import commits as transfers

    version = parse_version(body.tag)
    repository = parse_repository(f"{namespace}/{name}")
    findings = transfers.release(resources, actor, repository, revision, version, body.message or "")
    return with_findings(JSONResponse({}), f"{repository}:{version}", findings)


@router.post("/api" + MODEL + "/branch/" + MAIN)
def refuse_main(namespace: str, name: str, resources: ResourcesOf, actor: Publisher) -> Response:
    """Always a conflict, since `main` exists; `push_to_hub(revision="main")` tries to create it, and ignores that."""
    repository = parse_repository(f"{namespace}/{name}")
    with resources.read() as session:
        repositories.find(session, repository)
    raise Conflict(
        "channel_exists",
        f"{repository} has {MAIN} already: it is where commits go.",
        subject=f"{repository}@{MAIN}",
        next_step="Commit to it, or give the channel another name.",
    )


@router.post("/api" + MODEL + "/branch/{channel}")
def create_branch(
    namespace: str, name: str, channel: str, body: BranchIn, resources: ResourcesOf, actor: Releaser
) -> Response:
    """Promotes a release to a new channel; its gates and its policy hold as for every promotion."""
    repository = parse_repository(f"{namespace}/{name}")
    with resources.write() as session:
        version = revisions.released_version(session, actor, repository, body.startingPoint or MAIN)
        expected = moves.Expected(moves.NOTHING_YET)
        wanted = moves.PromotionRequest(repository, version, parse_name(channel, "channel"), expected=expected)
        try:
            waits = isinstance(promotions.request(session, actor, wanted), Promotion)
        except Stale as error:  # with `exist_ok`, clients pass over a conflict
            raise Conflict(
                "channel_exists", f"{repository}@{channel} exists already.", subject=f"{repository}@{channel}"
            ) from error
    warning = (
        {"X-HF-Warning": f"promotion; {repository}@{channel} waits for the requirements of its policy."}
        if waits
        else {}
    )
    return JSONResponse({}, headers=warning)


@router.delete("/api" + MODEL + "/tag/{revision}")
@router.delete("/api" + MODEL + "/branch/{revision}")
def refuse_deletion(revision: str, actor: Reader) -> Response:
    raise NotAllowed(
        "never_deleted",
        f"{revision[:80]!r} cannot be deleted: releases are yanked, and channels keep their history.",
        subject=revision[:80],
        next_step="Use `adaptory yank`, `adaptory rollback`, or `adaptory channel delete`.",
    )


@router.delete("/api/repos/delete")
def refuse_removal(body: RepositoryIn, resources: ResourcesOf, actor: Caller) -> Response:
    namespace = (body.organization or actor.name).lower()
    raise _permanent(resources, actor, f"{namespace}/{body.name.lower()}", "deleted")


@router.post("/api/repos/move")
def refuse_move(body: MoveIn, resources: ResourcesOf, actor: Caller) -> Response:
    raise _permanent(resources, actor, body.fromRepo.lower(), "renamed")


def _permanent(resources: Resources, actor: Actor, named: str, what: str) -> NotAllowed:
    """The refusal to delete or rename a repository. Raises NotFound for one that the caller does not see."""
    repository = parse_repository(named)
    unknown = repositories.unknown(named)
    permit(actor, Role.READER, repository.namespace, hidden=unknown)
    with resources.read() as session:
        if not repositories.exists(session, repository):
            raise unknown
    return NotAllowed(
        "never_deleted",
        f"{repository} cannot be {what}: channels and compositions name its releases.",
        subject=named,
        next_step="Yank its releases, or use another repository.",
    )


@router.put("/api" + MODEL + "/settings")
def refuse_settings(namespace: str, name: str, actor: Reader) -> Response:
    visible = "public" if namespace in actor.public else "private"
    raise NotAllowed(
        "settings_of_namespace",
        f"{namespace}/{name} is {visible}, as everything in {namespace}; a repository has no settings of its own.",
        subject=f"{namespace}/{name}",
        next_step=f"An admin can change {namespace}: `adaptory namespace set`.",
    )


def _not_a_model(kind: str) -> NotFound:
    return NotFound(
        "hub_route_unknown",
        f"This registry has no repositories of type {kind[:80]!r}.",
        subject=kind[:80],
        next_step="Leave the type out: adapters are models too.",
    )


def _oids(resources: Resources, held: list[ManifestFile]) -> dict[str, str]:
    """The digests with which a client detects unchanged files: the sha256 of a file that would be sent before the
    commit, git's name for one that would be sent in it.
    """
    from registry.transfer import commits as transfers

    large = [file for file in held if file.size_bytes > INLINE_BYTES and uploads.has_bytes(resources, file)]
    small = [file for file in held if file.size_bytes <= INLINE_BYTES]
    return {file.path: file.sha256 for file in large} | transfers.git_oids(resources, small)


def _lfs_object(request: Request, file: ManifestFile, sending: lfs.Sending | None) -> dict[str, Any]:
    described: dict[str, Any] = {"oid": file.sha256, "size": file.size_bytes}
    if sending is None:
        return described
    finish = {"href": _permitted_url(request, sending.finish)} if sending.finish else {}
    if sending.parts:
        parts = {f"{number:05}": url for number, url in enumerate(sending.parts, start=1)}
        in_parts = {**finish, "header": {"chunk_size": str(sending.part_bytes), **parts}}
        return {**described, "actions": {"upload": in_parts}}
    href = sending.put or _permitted_url(request, sending.send)
    actions: dict[str, Any] = {"upload": {"href": href, "header": {}}}
    return {**described, "actions": {**actions, "verify": finish} if finish else actions}


def _permitted_url(request: Request, permit: lfs.LfsPermit | None) -> str:
    if permit is None:
        return ""
    query = {"act": permit.act, "expires": permit.expires, "signature": permit.signature}
    query |= {"multipart": permit.multipart_id} if permit.multipart_id else {}
    query |= {"token": permit.token_id} if permit.token_id else {}
    return f"{request.base_url}api/lfs/{permit.namespace}/{permit.sha256}?{urlencode(query)}"
