"""Indexes releases for search: interned target sets and traits, and an index of terms from the name, the notes, the
provenance and the namespace."""

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from hashlib import sha256
from typing import Any, cast

from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from composer.formats.checkpoints.card import FIELDS
from registry.database.engine import insert_if_absent
from registry.database.tables import Release, ReleaseWord, TargetSet, TargetSetMember, Traits
from registry.errors import Invalid

MAX_WORDS = 500
"""Maximum words indexed per release; the rest of very long notes is ignored."""
MAX_WORD_CHARACTERS = 40
MAX_STATED = 2_000
"""Maximum provenance entries per release; only lists among the hyperparameters, which come last, exceed it."""
MAX_ENTRY_CHARACTERS = 200
_SETTING = "hyperparameters."
STATED_NAMES = tuple(
    sorted([*(name for name in FIELDS if name != "hyperparameters"), "data_license", f"{_SETTING}NAME"])
)
_WORD = re.compile(r"[^\W_]+")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d{1,3})?")


def index_release(session: Session, release: Release) -> None:
    """Adds a release, with facts and name set, to the database and the search index."""
    release.traits_id = _traits(session, release)
    session.add(release)
    session.flush()
    terms = text_terms(f"{release.repository.namespace} {release.repository.name} {release.notes}")[:MAX_WORDS]
    terms += provenance_terms(release.provenance) + namespace_terms(
        release.repository.namespace, release.repository.name
    )
    session.execute(insert(ReleaseWord), [{"word": word, "release_id": release.id} for word in terms])


def text_terms(text: str) -> list[str]:
    """The words of a text in order of first appearance, folded to ignore case and width."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return list(dict.fromkeys(word[:MAX_WORD_CHARACTERS] for word in _WORD.findall(folded)))


def provenance_terms(provenance: Mapping[str, Any]) -> list[str]:
    """An entry for each value of a provenance in the form of `composer.formats.checkpoints.card`."""
    return list(dict.fromkeys(_entry(name, value) for name, value in _values(provenance)))[:MAX_STATED]


def namespace_terms(namespace: str, name: str | None = None) -> list[str]:
    """Entries for the namespace and, with a name, the repository. Word searches never match them."""
    return [f"/{namespace}"] + ([f"/{namespace}/{name}"] if name else [])


def parse_stated(text: str) -> str:
    """The entry of `NAME:VALUE`. Raises Invalid for an unknown name or a missing value."""
    name, _, value = text.partition(":")
    known = _folded(name) in STATED_NAMES or (_folded(name).startswith(_SETTING) and _folded(name) != _SETTING)
    if not known or not value.strip():
        raise Invalid(
            "bad_provenance",
            f"The provenance {text[:80]!r} must be written NAME:VALUE, with a known name.",
            subject=text[:80],
            next_step=f"NAME is one of {', '.join(STATED_NAMES)}.",
        )
    return _entry(name, value)


def _values(provenance: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """Names and values to index. A data set's digest is indexed as its name too, so that either finds it."""
    for name, value in provenance.items():
        if name == "data":
            for row in value:
                yield from (("data_license" if part == "license" else name, item) for part, item in row.items() if item)
        elif name != "hyperparameters":
            yield from ((name, item) for item in _each(value))
    for key, value in provenance.get("hyperparameters", {}).items():
        yield from ((_SETTING + key, item) for item in _each(value))


def _each(value: object) -> list[object]:
    return cast("list[object]", value) if isinstance(value, list) else [value]


def _entry(name: str, value: object) -> str:
    """An index entry, starting with a character that no word contains. Normalizes numbers; stores a digest for entries
    longer than the column."""
    name, text = _folded(name), _folded(str(value))
    if name.startswith(_SETTING) and _NUMBER.fullmatch(text):
        text = str(Decimal(text).normalize())
    entry = f"={name}={text}"
    return entry if len(entry) <= MAX_ENTRY_CHARACTERS else f"={sha256(entry.encode()).hexdigest()}"


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold().strip()


def target_set_key(targets: Sequence[str]) -> str:
    """The digest of a set of targets, whose names can have any length."""
    return sha256("\n".join(sorted(set(targets))).encode()).hexdigest()


def target_set(session: Session, targets: Sequence[str]) -> int:
    """The id of the set, added if new."""
    key = target_set_key(targets)
    known = select(TargetSet.id).where(TargetSet.key == key)
    set_id = session.scalar(known)
    if set_id is None:
        insert_if_absent(session, TargetSet, key=key)
        set_id = session.scalars(known).one()
        for target in sorted(targets):
            insert_if_absent(session, TargetSetMember, target_set_id=set_id, target=target)
    return set_id


def _traits(session: Session, release: Release) -> int:
    facts = {
        "base_digest": release.base.digest,
        "kind": release.repository.kind,
        "type": release.type,
        "variant": release.variant,
        "rank_max": release.rank_max,
        "alpha": release.alpha,
        "dtype": release.dtype,
        "license": release.license,
        "target_set_id": release.target_set_id,
        "servers": release.servers,
    }
    key = traits_key(facts)
    known = select(Traits.id).where(Traits.key == key)
    traits_id = session.scalar(known)
    if traits_id is None:
        insert_if_absent(session, Traits, key=key, **facts)
        traits_id = session.scalars(known).one()
    return traits_id


def traits_key(facts: dict[str, str | int | float | None]) -> str:
    """The key of a combination of traits: equal values have one row."""
    return sha256(json.dumps(list(facts.values())).encode()).hexdigest()
