"""Lineage of a release: members and weights from the registry, rules and method from its own adaptory.json."""

import hashlib
from collections import Counter, defaultdict
from dataclasses import replace

from composer.formats.recipes.weights import Weight
from registry.client.api import Api
from registry.errors import Unavailable
from registry.formats.lineage import AS_SET, NOTE_BYTES, NOTE_FILE, Lineage, LineageInput, of_note
from registry.wire.catalog import InputOut, ReleaseOut


def of_release(release: ReleaseOut, note: bytes) -> Lineage | None:
    """The composition of a release, or None. Members and weights come from the registry, which hides those that the
    reader may not see. Rules, method and order come from the release's own `note`, if that names the same members; its
    order is the recipe's."""
    known = release.inputs
    if not known:
        return None
    noted = of_note(note)
    rows: dict[tuple[str, float], list[InputOut]] = defaultdict(list)
    for row in known:
        rows[row.commit, row.weight].append(row)
    if noted and Counter(map(_key, noted.members)) == {key: len(alike) for key, alike in rows.items()}:
        return replace(
            noted, members=tuple(_member(rows[_key(member)].pop(0), member.weight) for member in noted.members)
        )
    return Lineage(tuple(_member(row, Weight(row.weight)) for row in known), AS_SET if release.kind == "set" else "")


def fetch_note(api: Api, release: ReleaseOut) -> bytes:
    """The verified adaptory.json of a composed release; empty if there is none.

    Raises Unavailable if the bytes are not those that were published.
    """
    row = next((row for row in release.files if row.path == NOTE_FILE), None)
    if row is None or not release.inputs or row.size_bytes > NOTE_BYTES:
        return b""
    content = bytearray()
    with api.stream(f"{release.path}/files/{NOTE_FILE}") as stream:
        for block in stream.chunks:
            content += block
            if len(content) > row.size_bytes:
                break
    if hashlib.sha256(content).hexdigest() != row.sha256:
        raise Unavailable(
            "blob_corrupt",
            f"{NOTE_FILE} of {release.name} was damaged on the way or in the store.",
            subject=NOTE_FILE,
        )
    return bytes(content)


def _key(member: LineageInput) -> tuple[str, float]:
    return member.commit, member.weight.value


def _member(row: InputOut, weight: Weight) -> LineageInput:
    return LineageInput(row.repository or "a release without access", row.version or "", row.commit, weight)
