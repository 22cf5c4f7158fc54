"""Renders rows as the hub's client reads them. Call inside the transaction that read the rows."""

from collections.abc import Mapping, Sequence
from datetime import datetime

import orjson

from registry.api.hub.wire import date
from registry.database.engine import Session
from registry.database.tables import Repository
from registry.domain.access.audit import Actor
from registry.domain.access.roles import EVERYWHERE, Role, at_least, namespaces_of
from registry.domain.catalog import bases, commits, releases, repositories
from registry.domain.catalog.commits import HistoryEntry
from registry.domain.catalog.release_rows import ReleaseRow, load_details
from registry.domain.catalog.releases import PublishedEntry
from registry.domain.catalog.repositories import Kind
from registry.domain.catalog.tags import LIBRARIES, list_tags
from registry.domain.channels import resolve
from registry.domain.channels.revisions import MAIN, NEXT, Located, Refs
from registry.formats.licenses import spdx
from registry.formats.manifest import ManifestFile, TreeEntry, parse_manifest

POINTER_BYTES = 134
"""The size of the Git LFS pointer that a file would have; the client requires the field."""
_OID_DIGITS = 40


def whoami(actor: Actor) -> dict[str, object]:
    namespaces = sorted(name for name in namespaces_of(actor) if name != EVERYWHERE)
    role = "write" if any(at_least(granted, Role.PUBLISHER) for granted in actor.grants.values()) else "read"
    return {
        "type": "user",
        "name": actor.name,
        "fullname": actor.name,
        "orgs": [{"type": "org", "name": name} for name in namespaces],
        "auth": {"type": "access_token", "accessToken": {"displayName": actor.token_id or "", "role": role}},
    }


def model_info(session: Session, actor: Actor, located: Located, *, blobs: bool) -> dict[str, object]:
    """One model with its files; with `blobs`, also their sizes and digests."""
    repository = repositories.find(session, located.repository)
    files = parse_manifest(located.manifest)
    siblings = [_sibling(file) if blobs else {"rfilename": file.path} for file in files]
    info = {**_summary(actor, repository), "sha": located.commit, "tags": [], "siblings": siblings}
    if located.release_id is None:
        return info
    [details] = load_details(session, [located.release_id])
    aliases = bases.aliases(session, [details.release.base_digest])
    return {**info, **_of_release(details.release, aliases[details.release.base_digest])}


def model_page(session: Session, actor: Actor, listed: Sequence[Repository]) -> list[dict[str, object]]:
    """Models at their `main`, without their files, with three queries for a page."""
    newest = resolve.newest_ids(session, *listed)
    details = load_details(session, list(newest.values()))
    rows = dict(zip(newest, (detail.release for detail in details), strict=True))
    aliases = bases.aliases(session, {row.base_digest for row in rows.values()})
    return [
        {
            **_summary(actor, repository),
            **(_of_release(row, aliases[row.base_digest]) if (row := rows.get(repository.id)) else {}),
        }
        for repository in listed
    ]


def _summary(actor: Actor, repository: Repository) -> dict[str, object]:
    name = str(repositories.name_of(repository))
    return {
        "id": name,
        "modelId": name,
        "author": repository.namespace,
        "private": repository.namespace not in actor.public,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "createdAt": date(repository.created_at),
    }


def _of_release(row: ReleaseRow, aliases: Sequence[str]) -> dict[str, object]:
    kind, names = Kind(row.kind), [*aliases, row.base_name]
    stated = orjson.loads(row.provenance).get("license")
    card: dict[str, object] = {"base_model": names[0], "library_name": LIBRARIES[kind]}
    return {
        "sha": row.commit,
        "lastModified": date(datetime.fromisoformat(row.created_at)),
        "library_name": LIBRARIES[kind],
        "tags": list_tags(kind, names, stated),
        "cardData": {**card, "license": spdx(stated).lower()} if stated else card,
    }


def _sibling(file: ManifestFile) -> dict[str, object]:
    lfs = {"sha256": file.sha256, "size": file.size_bytes, "pointerSize": POINTER_BYTES}
    return {"rfilename": file.path, "size": file.size_bytes, "blobId": file.sha256[:_OID_DIGITS], "lfs": lfs}


def tree_page(
    session: Session, located: Located, entries: Sequence[TreeEntry], *, expand: bool
) -> list[dict[str, object]]:
    """Files and directories; with `expand`, with the release that brought each."""
    rendered = [_tree_entry(entry, located.commit) for entry in entries]
    if not expand:
        return rendered
    brought = releases.list_introductions(session, located.repository, located.revision_id)
    brought_by = [_last_commit(entry, brought) for entry in entries]
    if None in brought_by:  # the files of commits that are not released yet
        own = commit_view(commits.list_history(session, located.repository, located.commit)[0])
        brought_by = [commit or {name: own[name] for name in ("id", "title", "date")} for commit in brought_by]
    return [entry | {"lastCommit": last} for entry, last in zip(rendered, brought_by, strict=True)]


def _tree_entry(entry: TreeEntry, commit: str) -> dict[str, object]:
    """Every file is described as an LFS file, so that the client compares its sha256."""
    file = entry.file
    if file is None:
        return {"type": "directory", "path": entry.path, "oid": commit, "size": 0}
    lfs = {"oid": file.sha256, "size": file.size_bytes, "pointerSize": POINTER_BYTES}
    oid = file.sha256[:_OID_DIGITS]
    return {"type": "file", "path": entry.path, "oid": oid, "size": file.size_bytes, "lfs": lfs}


def _last_commit(entry: TreeEntry, brought: Mapping[str, PublishedEntry]) -> dict[str, object] | None:
    """The release that brought a file; for a directory, the last one that brought a file below it."""
    if entry.file:
        last = brought.get(entry.path)
    else:
        below = (published for path, published in brought.items() if path.startswith(f"{entry.path}/"))
        last = max(below, key=lambda published: published.id, default=None)
    if last is None:
        return None
    return {"id": last.commit, "title": last.version, "date": date(last.created_at)}


def refs(named: Refs, *, pull_requests: bool) -> dict[str, object]:
    """Channels, `main` and drafts as branches, versions as tags."""
    heads = {MAIN: named.main, NEXT: named.drafts, **named.channels}
    heads = {name: commit for name, commit in heads.items() if commit}
    document: dict[str, object] = {
        "branches": [_ref("heads", name, commit) for name, commit in heads.items()],
        "tags": [_ref("tags", name, commit) for name, commit in named.versions.items()],
        "converts": [],
    }
    return {**document, "pullRequests": []} if pull_requests else document


def _ref(kind: str, name: str, commit: str | None) -> dict[str, object]:
    return {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": commit}


def commit_view(entry: HistoryEntry) -> dict[str, object]:
    return {
        "id": entry.commit,
        "title": entry.title,
        "message": entry.message,
        "authors": [{"user": entry.author, "avatar": ""}],
        "date": date(entry.created_at),
    }
