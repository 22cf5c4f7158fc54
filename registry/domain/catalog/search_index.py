"""What a release is found by: its target set and its traits, interned, and in the index of words those of its name and
notes, what its provenance states, and where it is."""

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
"""Of one release: who writes a book into the notes is found by its first chapters."""
MAX_WORD_CHARACTERS = 40
MAX_STATED = 2_000
"""Of one release: only lists among its hyperparameters, which come last, are longer."""
MAX_ENTRY_CHARACTERS = 200
_SETTING = "hyperparameters."
STATED_NAMES = tuple(
    sorted([*(name for name in FIELDS if name != "hyperparameters"), "data_license", f"{_SETTING}NAME"])
)
_WORD = re.compile(r"[^\W_]+")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d{1,3})?")


def index_release(session: Session, release: Release) -> None:
    """Adds a release to the registry and to what searches look at; its facts and its name are set already."""
    release.traits_id = _traits(session, release)
    session.add(release)
    session.flush()
    found = text_terms(f"{release.repository.namespace} {release.repository.name} {release.notes}")[:MAX_WORDS]
    found += provenance_terms(release.provenance) + namespace_terms(
        release.repository.namespace, release.repository.name
    )
    session.execute(insert(ReleaseWord), [{"word": word, "release_id": release.id} for word in found])


def text_terms(text: str) -> list[str]:
    """Letters and digits in the order of their first appearance, folded so that case and width don't count."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return list(dict.fromkeys(word[:MAX_WORD_CHARACTERS] for word in _WORD.findall(folded)))


def provenance_terms(provenance: Mapping[str, Any]) -> list[str]:
    """An entry for each value that a provenance, in the form of `composer.formats.checkpoints.card`, states."""
    return list(dict.fromkeys(_entry(name, value) for name, value in _values(provenance)))[:MAX_STATED]


def namespace_terms(namespace: str, name: str | None = None) -> list[str]:
    """The entries of what is in that namespace and, with a name, in that repository. No search for words finds them."""
    return [f"/{namespace}"] + ([f"/{namespace}/{name}"] if name else [])


def parse_stated(text: str) -> str:
    """The entry of `NAME:VALUE`. Raises Usage for a name that no provenance has, or without a value."""
    name, _, value = text.partition(":")
    known = _folded(name) in STATED_NAMES or (_folded(name).startswith(_SETTING) and _folded(name) != _SETTING)
    if not known or not value.strip():
        raise Invalid(
            "bad_provenance",
            f"{text[:80]!r} is not NAME:VALUE of a provenance.",
            subject=text[:80],
            next_step=f"NAME is one of {', '.join(STATED_NAMES)}.",
        )
    return _entry(name, value)


def _values(provenance: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """The digest of data is a name of it too, so that either finds it."""
    for name, value in provenance.items():
        if name == "data":
            for row in value:
                yield from (("data_license" if part == "license" else name, told) for part, told in row.items() if told)
        elif name != "hyperparameters":
            yield from ((name, one) for one in _each(value))
    for key, value in provenance.get("hyperparameters", {}).items():
        yield from ((_SETTING + key, one) for one in _each(value))


def _each(value: object) -> list[object]:
    return cast("list[object]", value) if isinstance(value, list) else [value]


def _entry(name: str, value: object) -> str:
    """Begins with a character that no word has, so that no search for words finds it. A number is the same however it
    is written; what is longer than the column is kept as its digest."""
    name, told = _folded(name), _folded(str(value))
    if name.startswith(_SETTING) and _NUMBER.fullmatch(told):
        told = str(Decimal(told).normalize())
    entry = f"={name}={told}"
    return entry if len(entry) <= MAX_ENTRY_CHARACTERS else f"={sha256(entry.encode()).hexdigest()}"


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold().strip()


def target_set_key(targets: Sequence[str]) -> str:
    """A digest, since a list of full paths can have any length."""
    return sha256("\n".join(sorted(set(targets))).encode()).hexdigest()


def target_set(session: Session, targets: Sequence[str]) -> int:
    """The id of the set, which is added when it is new."""
    key = target_set_key(targets)
    known = select(TargetSet.id).where(TargetSet.key == key)
    found = session.scalar(known)
    if found is None:
        insert_if_absent(session, TargetSet, key=key)
        found = session.scalars(known).one()
        for target in sorted(targets):
            insert_if_absent(session, TargetSetMember, target_set_id=found, target=target)
    return found


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
    found = session.scalar(known)
    if found is None:
        insert_if_absent(session, Traits, key=key, **facts)
        found = session.scalars(known).one()
    return found


def traits_key(facts: dict[str, str | int | float | None]) -> str:
    return sha256(json.dumps(list(facts.values())).encode()).hexdigest()
