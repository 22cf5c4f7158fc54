"""Releases as JSON documents, as ReleaseOut describes them.

Built from columns that were validated when written; JSON columns are sent unchanged. Parsing, validating and writing a
page of fifty again would cost several times the query. Tests check the documents against the schemas.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from operator import attrgetter
from threading import Lock
from typing import Any

import orjson
from starlette.responses import Response

from composer.formats.adapters.serving import SERVERS
from registry.database.engine import Session
from registry.database.tables import Release
from registry.domain.access.audit import Actor
from registry.domain.access.roles import may_read
from registry.domain.catalog.release_rows import BATCH_SIZE, SHOWN, ReleaseDetails, ReleaseRow, Stamp, load_details
from registry.domain.catalog.repositories import Kind
from registry.domain.channels.policy.gates import NO_FIGURES
from registry.domain.channels.serving import ChannelMove
from registry.formats.licenses import spdx
from registry.formats.references import RepositoryName
from registry.wire.catalog import Provenance, ReleaseOut

_shown = attrgetter(*SHOWN)
_NO_PROVENANCE = Provenance().model_dump()
_MANIFEST = '{"files":', "}"
"""Prefix and suffix of the file rows in a canonical manifest."""
MAX_KEPT_BYTES = 64 << 20
"""About 20,000 documents of adapters with three files and four scores."""
PAGE_BYTES = 16 << 20
"""A page ends early at this size: a release of thousands of files takes a megabyte."""
_ENTRY_BYTES = 600  # measured overhead per document besides its text


def json_response(document: dict[str, object], **headers: str) -> Response:
    return Response(_dumped(document), media_type="application/json", headers=headers)


def move_document(moved: ChannelMove, repository: RepositoryName, channel: str) -> dict[str, object]:
    """The document of a move, as MoveOut."""
    return {
        "id": moved.id,
        "repository": str(repository),
        "channel": channel,
        "kind": moved.kind,
        "from_version": moved.from_version,
        "to_version": moved.to_version,
        "actor": moved.actor,
        "reason": moved.reason,
        "forced": moved.forced,
        "gates": [{**NO_FIGURES, **result} for result in moved.gates],
        "at": moved.at,
        "changed": moved.changed,
    }


def release_documents(session: Session, actor: Actor, release_ids: Sequence[int]) -> list[bytes]:
    """The documents in the order of the ids: as many as fit a page."""
    written: list[bytes] = []
    for some in _in_parts(release_ids):
        written += [_dumped(release_document(actor, detail)) for detail in load_details(session, some)]
        if (fit := _how_many_fit(map(len, written))) < len(written):
            return written[:fit]
    return written


def releases_shown(session: Session, actor: Actor, release_ids: Sequence[int]) -> list[ReleaseOut]:
    """Typed form of `release_documents`."""
    return [ReleaseOut.model_validate_json(document) for document in release_documents(session, actor, release_ids)]


def release_view(session: Session, actor: Actor, release: Release) -> ReleaseOut:
    """One release, typed."""
    session.flush()
    return releases_shown(session, actor, [release.id])[0]


def _in_parts(release_ids: Sequence[int]) -> Iterator[Sequence[int]]:
    return (release_ids[start : start + BATCH_SIZE] for start in range(0, len(release_ids), BATCH_SIZE))


def _how_many_fit(sizes: Iterable[int]) -> int:
    """The number of documents of these sizes that fit a page; at least one."""
    return max(1, sum(total <= PAGE_BYTES for total in accumulate(sizes)))


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedRelease:
    """A release's document, and the columns that a search comments on."""

    stamp: Stamp
    document: bytes
    base_digest: str
    rank_max: int | None
    servers: int
    loading: str

    @property
    def size_bytes(self) -> int:
        return _ENTRY_BYTES + len(self.document) + len(self.loading)

    def with_remarks(self, remarks: bytes) -> bytes:
        """The document with the fields of the JSON object `remarks` appended."""
        return self.document[:-1] + b"," + remarks[1:]


@dataclass(slots=True)
class RenderedReleaseCache:
    """Caches the most recently used documents; each use checks in the database that they are current.
    `kept_bytes` is their approximate size in memory.

    Releases with inputs are not cached, since their documents depend on the caller.
    """

    max_bytes: int = MAX_KEPT_BYTES
    kept_bytes: int = 0
    _kept: "OrderedDict[int, RenderedRelease]" = field(default_factory=OrderedDict[int, RenderedRelease])
    _lock: Lock = field(default_factory=Lock)

    def page(self, session: Session, actor: Actor, stamps: Mapping[int, Stamp]) -> list[RenderedRelease]:
        """The documents in the order of `stamps`, the current ids and stamps: as many as fit a page."""
        rendered: list[RenderedRelease] = []
        for some in _in_parts(list(stamps)):
            rendered += self._render(session, actor, {number: stamps[number] for number in some})
            if (fit := _how_many_fit(len(release.document) for release in rendered)) < len(rendered):
                return rendered[:fit]
        return rendered

    def _render(self, session: Session, actor: Actor, stamps: Mapping[int, Stamp]) -> list[RenderedRelease]:
        rendered = self._current(stamps)
        for detail in load_details(session, [number for number in stamps if number not in rendered]):
            row = detail.release
            document = _dumped(release_document(actor, detail))
            new = RenderedRelease(
                stamp=detail.stamp,
                document=document,
                base_digest=row.base_digest,
                rank_max=row.rank_max,
                servers=row.servers,
                loading=row.loading,
            )
            rendered[row.id] = new
            if not detail.inputs:
                self._keep(row.id, new)
        return [rendered[number] for number in stamps]

    def _current(self, now: Mapping[int, Stamp]) -> dict[int, RenderedRelease]:
        with self._lock:
            rendered = {
                number: kept for number in now if (kept := self._kept.get(number)) and kept.stamp == now[number]
            }
            for number in rendered:
                self._kept.move_to_end(number)
        return rendered

    def _keep(self, release_id: int, rendered: RenderedRelease) -> None:
        with self._lock:
            before = self._kept.pop(release_id, None)
            self._kept[release_id] = rendered
            self.kept_bytes += rendered.size_bytes - (before.size_bytes if before else 0)
            while self.kept_bytes > self.max_bytes:
                _, oldest = self._kept.popitem(last=False)
                self.kept_bytes -= oldest.size_bytes


def page_response(items: Sequence[bytes], following: str | None, facets: dict[str, object] | None = None) -> Response:
    """A Page of documents that are serialized already, and the choices of each facet if there are any."""
    further = b',"facets":%b' % orjson.dumps(facets) if facets else b""
    body = b'{"items":[%b],"next":%b%b}' % (b",".join(items), orjson.dumps(following), further)
    return Response(body, media_type="application/json")


def _dumped(document: dict[str, object]) -> bytes:
    return orjson.dumps(document, option=orjson.OPT_UTC_Z)


def release_document(actor: Actor, described: ReleaseDetails) -> dict[str, object]:
    """The document as the actor may see it: inputs show their commit, and their name only if the actor may read it."""
    row = described.release
    facts = {kind.value: orjson.Fragment(row.facts) if row.kind == kind else None for kind in Kind}
    return {
        "repository": f"{row.namespace}/{row.repository}",
        **dict(zip(SHOWN, _shown(row), strict=True)),
        "base": {"digest": row.base_digest, "name": row.base_name},
        **facts,
        "scores": _scores(described),
        "yanked": bool(row.yanked),
        "taken_down": row.taken_down_at and {"at": row.taken_down_at, "reason": row.takedown_reason},
        "deprecated": deprecation(row.deprecated_reason, row.successor),
        "base_deprecated": deprecation(row.base_deprecated_reason, row.base_successor),
        "files": files_of(row.manifest),
        "inputs": [
            {
                "repository": f"{namespace}/{repository}" if may_read(actor, namespace) else None,
                "version": version if may_read(actor, namespace) else None,
                "commit": commit,
                "weight": float(weight),
                "yanked": bool(yanked),
                "yank_reason": reason if may_read(actor, namespace) else None,
                "taken_down": bool(taken_down),
            }
            for _, _, namespace, repository, version, commit, weight, yanked, reason, taken_down in described.inputs
        ],
        "provenance": _NO_PROVENANCE if row.provenance == "{}" else _NO_PROVENANCE | orjson.loads(row.provenance),
        "licenses": _licenses(row),
        "servers": _servers(row.servers),
        "loading": orjson.Fragment(row.loading),
    }


def _licenses(row: ReleaseRow) -> dict[str, object]:
    """Licences of the base, the adapter and its data, as LicensesOut."""
    stated: dict[str, Any] = {} if row.provenance == "{}" else orjson.loads(row.provenance)
    base, own = row.base_license or stated.get("base_license"), stated.get("license")
    data = [data_set["license"] for data_set in stated.get("data", ()) if data_set.get("license")]
    return {
        "base": spdx(base) if base else None,
        "adapter": spdx(own) if own else None,
        "data": list(dict.fromkeys(map(spdx, data))),
    }


def deprecation(reason: str | None, successor: str | None) -> dict[str, object] | None:
    """The document of a deprecation, as DeprecationOut."""
    return None if reason is None else {"reason": reason, "successor": successor}


@lru_cache(1 << len(SERVERS))
def _servers(mask: int) -> tuple[str, ...]:
    return tuple(server for bit, server in enumerate(SERVERS) if mask >> bit & 1)


def files_of(manifest: str) -> orjson.Fragment:
    """The file rows of a canonical manifest, which are those of a document."""
    before, after = _MANIFEST
    return orjson.Fragment(manifest.removeprefix(before).removesuffix(after))


def _scores(described: ReleaseDetails) -> list[dict[str, object]]:
    """The scores. Every evaluation of a release puts the phrases that it states before the prompts of their suites."""
    stated = described.release.provenance
    phrases: Mapping[str, str] = orjson.loads(stated).get("phrases", {}) if '"phrases"' in stated else {}
    return [
        {
            "suite": suite,
            "suite_digest": digest,
            "kind": kind,
            "task": task,
            "metric": metric,
            "value": float(value),
            "stderr": None if stderr is None else float(stderr),
            "n": n,
            "higher_is_better": bool(higher_is_better),
            "reported": bool(reported),
            "source": source,
            "measured": measured,
            "measured_by": worker,
            "stated_by": None if worker else user,
            "phrase": None if reported or source else phrases.get(suite),
        }
        for (
            _, suite, metric, digest, value, stderr, n, higher_is_better, reported, measured, task, source, worker,
            user, kind,
        ) in described.scores
    ]  # fmt: skip
