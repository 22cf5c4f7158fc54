"""What a release is found by: its target set and its traits, interned, and the words of its name and notes."""

import json
import re
import unicodedata
from collections.abc import Sequence
from hashlib import sha256

from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from registry.db import insert_if_absent
from registry.models import Release, ReleaseWord, TargetSet, TargetSetMember, Traits

MAX_WORDS = 500
"""Of one release: who writes a book into the notes is found by its first chapters."""
MAX_WORD_CHARACTERS = 40
_WORD = re.compile(r"[^\W_]+")


def add(session: Session, release: Release) -> None:
    """Adds a release to the registry and to what searches look at; its facts and its name are set already."""
    release.traits_id = _traits(session, release)
    session.add(release)
    session.flush()
    found = words(f"{release.repository.namespace} {release.repository.name} {release.notes}")[:MAX_WORDS]
    session.execute(insert(ReleaseWord), [{"word": word, "release_id": release.id} for word in found])


def words(text: str) -> list[str]:
    """Letters and digits in the order of their first appearance, folded so that case and width don't count."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return list(dict.fromkeys(word[:MAX_WORD_CHARACTERS] for word in _WORD.findall(folded)))


def target_set_key(targets: Sequence[str]) -> str:
    """A digest, since a list of full paths can have any length."""
    return sha256("\n".join(sorted(targets)).encode()).hexdigest()


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
