"""Models: repositories at their revisions, as lists, trees, references and commits."""

from typing import Annotated
from urllib.parse import parse_qs

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import JSONResponse

from registry.api.http.pagination import decode_cursor, decode_number, encode_cursor
from registry.api.http.request import ResourcesOf, document, refuse_longer
from registry.api.http.rules import Caller, Publisher, Reader
from registry.api.hub import documents
from registry.api.hub.wire import HubRoute, next_page, revision_headers
from registry.domain.access.roles import refuse_anonymous
from registry.domain.catalog import commits, releases, repositories
from registry.domain.catalog.repositories import RepositoryFilter
from registry.domain.catalog.tags import narrow
from registry.domain.channels import revisions
from registry.domain.channels.revisions import MAIN
from registry.errors import NotFound
from registry.formats.manifest import list_directory, parse_manifest, select_entries

router = APIRouter(prefix="/api", route_class=HubRoute)

PAGE, TREE_PAGE = 100, 1_000
MODEL = "/models/{namespace}/{name}"
MAX_CONDITIONS = 20
"""Limit for each kind of filter in a list of models: each one lengthens a query that anyone may send."""
MAX_FORM_BYTES = 1 << 20
Values = Annotated[list[str], Query()]
Conditions = Annotated[list[str], Query(max_length=MAX_CONDITIONS)]


async def named_in_path(namespace: str, name: str) -> str:
    """NAMESPACE/NAME of the path, which may be an alias."""
    return f"{namespace}/{name}"


Named = Annotated[str, Depends(named_in_path)]


@router.get("/whoami-v2")
def whoami(actor: Caller) -> Response:
    refuse_anonymous(actor)
    return JSONResponse(documents.whoami(actor))


@router.get("/models")
def list_models(  # noqa: PLR0913
    request: Request,
    resources: ResourcesOf,
    actor: Caller,
    author: str | None = None,
    search: Conditions = [],  # noqa: B006
    filters: Annotated[list[str], Query(alias="filter", max_length=MAX_CONDITIONS)] = [],  # noqa: B006
    limit: Annotated[int, Query(ge=1)] = PAGE,
    cursor: str | None = None,
) -> Response:
    """Lists the models that the caller may read, by name."""
    size = min(limit, PAGE)
    asked = RepositoryFilter(namespace=author and author.lower(), words=[word.lower() for word in search])
    with resources.snapshot() as session:
        wanted, after = narrow(session, asked, filters), decode_cursor(cursor)
        rows = repositories.list_page(session, actor, wanted, after=after, limit=size + 1) if wanted else []
        items = documents.model_page(session, actor, rows[:size])
    more = next_page(request, encode_cursor(str(items[-1]["id"]))) if len(rows) > size else {}
    return JSONResponse(items, headers=more)


@router.get(MODEL)
@router.get(MODEL + "/revision/{revision:path}")
def show_model(  # noqa: PLR0913
    request: Request,
    named: Named,
    resources: ResourcesOf,
    actor: Reader,
    revision: str = MAIN,
    blobs: bool = False,
    expand: Values = [],  # noqa: B006
) -> Response:
    """Shows a model at a revision; with `expand`, only those fields."""
    with resources.snapshot() as session:
        located = revisions.locate(session, actor, named, revision)
        info = documents.model_info(session, actor, located, blobs=blobs)
    if expand:
        info = {name: value for name, value in info.items() if name == "id" or name in expand}
    return JSONResponse(info, headers=revision_headers(request, located))


@router.get(MODEL + "/refs")
def list_refs(named: Named, resources: ResourcesOf, actor: Reader, include_prs: bool = False) -> Response:
    with resources.snapshot() as session:
        refs = revisions.list_refs(session, actor, named)
    return JSONResponse(documents.refs(refs, pull_requests=include_prs))


@router.get(MODEL + "/commits/{revision:path}")
def list_commits(  # noqa: PLR0913
    request: Request,
    named: Named,
    revision: str,
    resources: ResourcesOf,
    actor: Reader,
    limit: Annotated[int, Query(ge=1)] = PAGE,
    cursor: str | None = None,
) -> Response:
    """Lists the commits and releases up to a revision, the newest first."""
    size, start = min(limit, PAGE), decode_number(cursor)
    with resources.snapshot() as session:
        located = revisions.locate(session, actor, named, revision)
        drafts = revisions.sees_all(session, actor, located.repository)
        rows = commits.list_history(session, located.repository, located.commit, drafts=drafts)
        rows = rows[start : start + size + 1]
    more = next_page(request, encode_cursor(start + size)) if len(rows) > size else {}
    return JSONResponse([documents.commit_view(row) for row in rows[:size]], headers=more)


@router.get(MODEL + "/tree/{revision}")
@router.get(MODEL + "/tree/{revision}/{directory:path}")
def list_tree(  # noqa: PLR0913
    request: Request,
    named: Named,
    revision: str,
    resources: ResourcesOf,
    actor: Reader,
    directory: str = "",
    recursive: bool = False,
    expand: bool = False,
    limit: Annotated[int, Query(ge=1)] = TREE_PAGE,
    cursor: str | None = None,
) -> Response:
    """Lists a directory of a revision; with `expand`, also the release that brought each entry."""
    size, after = min(limit, TREE_PAGE), decode_cursor(cursor)
    with resources.snapshot() as session:
        located = revisions.locate(session, actor, named, revision)
        headers = revision_headers(request, located)
        entries = list_directory(parse_manifest(located.manifest), directory.strip("/"), recursive=recursive)
        if not entries and directory:
            raise releases.unknown_file(located.full_name, directory)
        entries = [entry for entry in entries if entry.path > after]
        rendered = documents.tree_page(session, located, entries[:size], expand=expand)
    if len(entries) > size:
        headers |= next_page(request, encode_cursor(entries[size - 1].path))
    return JSONResponse(rendered, headers=headers)


async def form_of(request: Request) -> dict[str, list[str]]:
    """The fields of a form, which the client sends instead of JSON. Anyone may send one for a public namespace."""
    refuse_longer(request, "form", MAX_FORM_BYTES, "Ask for fewer paths at a time.")
    return parse_qs((await document(request)).decode("utf-8", "replace"))


@router.post(MODEL + "/paths-info/{revision:path}")
def list_paths(
    request: Request,
    named: Named,
    revision: str,
    resources: ResourcesOf,
    actor: Reader,
    form: Annotated[dict[str, list[str]], Depends(form_of)],
) -> Response:
    """Shows the files and directories with the given paths; leaves out those that are absent."""
    with resources.snapshot() as session:
        located = revisions.locate(session, actor, named, revision)
        entries = select_entries(parse_manifest(located.manifest), form.get("paths", []))
        expand = form.get("expand", [""])[0].lower() == "true"
        rendered = documents.tree_page(session, located, entries, expand=expand)
    return JSONResponse(rendered, headers=revision_headers(request, located))


@router.get(MODEL + "/auth-check")
def check_read(named: Named, resources: ResourcesOf, actor: Reader) -> Response:
    with resources.snapshot() as session:
        revisions.list_refs(session, actor, named)
    return JSONResponse({})


@router.get(MODEL + "/auth-check/write")
def check_write(named: Named, resources: ResourcesOf, actor: Publisher) -> Response:
    with resources.snapshot() as session:
        revisions.list_refs(session, actor, named)
    return JSONResponse({})


@router.get("/models/{name}")
@router.get("/models/{name}/revision/{revision:path}")
def show_nameless(name: str) -> Response:
    """Models without a namespace, such as gpt2: this registry has none."""
    raise repositories.unknown(name)


@router.api_route("/{path:path}", methods=["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"])
def answer_nothing(request: Request, path: str) -> Response:
    """All other calls of the client."""
    raise NotFound(
        "hub_route_unknown", f"This registry does not support {request.method} /api/{path[:120]}.", subject=path[:120]
    )
