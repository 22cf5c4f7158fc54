"""Releases as JSON documents, as ReleaseOut describes them.

Built from columns that were checked when they were written: to check a page of fifty again would cost more than to find
and read them. A test holds every document against its schema.
"""

import json
from collections.abc import Sequence
from typing import Any

from pydantic_core import to_json
from starlette.responses import Response

from composer.formats.serving import SERVERS
from registry.db import Session
from registry.descriptions import Description, describe
from registry.models import Release
from registry.repositories import Kind
from registry.schemas.catalog import Provenance, ReleaseOut

Json = dict[str, Any]


def json_response(document: Json) -> Response:
    return Response(to_json(document), media_type="application/json")


def release_documents(session: Session, release_ids: Sequence[int]) -> list[Json]:
    """In the order of the ids."""
    return [release_document(one) for one in describe(session, release_ids)]


def release_view(session: Session, release: Release) -> ReleaseOut:
    """One of them, checked."""
    session.flush()
    return ReleaseOut(**release_documents(session, [release.id])[0])


def release_document(described: Description) -> Json:
    row = described.release
    adapter = row.kind == Kind.ADAPTER
    return {
        "repository": f"{row.namespace}/{row.repository}",
        "kind": row.kind,
        "version": row.version,
        "commit": row.commit,
        "base": {"digest": row.base_digest, "name": row.base_name},
        "adapter": row.facts if adapter else None,
        "model": None if adapter else row.facts,
        "scores": [_score(score) for score in described.scores],
        "yanked": row.yanked,
        "yank_reason": row.yank_reason,
        "notes": row.notes,
        "created_at": row.created_at,
        "created_by": row.created_by,
        "files": files_of(row.manifest),
        "inputs": [
            {
                "repository": f"{source.namespace}/{source.repository}",
                "version": source.version,
                "commit": source.commit,
                "weight": source.weight,
            }
            for source in described.inputs
        ],
        "provenance": {**_NO_PROVENANCE, **row.provenance},
        "servers": [server for bit, server in enumerate(SERVERS) if row.servers >> bit & 1],
        "loading": row.loading,
        "signed_by": row.signed_by,
        "breaking_reason": row.breaking_reason,
    }


def files_of(manifest: str) -> list[Json]:
    """The canonical manifest has the rows of a document, already in its order."""
    return json.loads(manifest)["files"]


_NO_PROVENANCE = Provenance().model_dump()


def _score(row: Any) -> Json:
    return {
        "suite": row.name,
        "suite_digest": row.digest,
        "metric": row.metric,
        "value": row.value,
        "stderr": row.stderr,
        "n": row.n,
        "higher_is_better": row.higher_is_better,
        "measured": row.measured_at,
    }
