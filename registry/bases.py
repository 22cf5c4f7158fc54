"""Base models: registered by what their weights are, found by digest, name or alias."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from sqlalchemy import or_, select
from sqlalchemy.orm import Session, undefer

from composer.formats.checkpoint import Architecture, TensorSpec
from composer.hashing import architecture_digest, weights_digest
from registry import audit
from registry.audit import Act, Actor
from registry.errors import Conflict, Invalid, NotFound, Usage
from registry.models import Base, BaseAlias, BaseLocation
from registry.names import Digest, parse_part

RELATIONS = ("quantized", "cast", "finetuned", "merged")
_ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,198}")
_DIGEST_LIKE = re.compile(r"[0-9a-f]{12,64}")
_SCHEMES = ("file://", "hf://", "s3://")


@dataclass(frozen=True, slots=True)
class TensorRow:
    """One line of the tensor table: safetensors dtype, shape, sha256 of the raw little-endian bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: Digest


@dataclass(frozen=True, slots=True)
class NewBase:
    name: str
    model_type: str
    tied: bool
    parameters: int
    size_bytes: int
    tensors: Sequence[TensorRow]
    weights_digest: Digest
    aliases: Sequence[str] = ()
    locations: Sequence[str] = field(default=())


def register(session: Session, actor: Actor, new: NewBase) -> tuple[Base, bool]:
    """The base and whether it is new. Adding a known base again only adds aliases and locations."""
    table = {row.name: row for row in new.tensors}
    architecture = Architecture(
        new.model_type, new.tied, {row.name: TensorSpec(row.dtype, row.shape) for row in new.tensors}
    )
    if (
        len(table) != len(new.tensors)
        or weights_digest((r.name, r.dtype, r.shape, r.sha256) for r in new.tensors) != new.weights_digest
    ):
        raise Invalid(
            "digest_differs",
            "The weights digest does not follow from the tensor table.",
            subject=new.name,
            next_step="Hash the checkpoint again.",
        )
    base = session.get(Base, new.weights_digest)
    created = base is None
    if base is None:
        _refuse_taken_name(session, new)
        rows = [
            [row.name, row.dtype, list(row.shape), row.sha256] for row in sorted(new.tensors, key=lambda row: row.name)
        ]
        base = Base(
            digest=new.weights_digest,
            architecture_digest=architecture_digest(architecture),
            name=parse_part(new.name, "base name"),
            model_type=new.model_type,
            tied=new.tied,
            parameters=new.parameters,
            size_bytes=new.size_bytes,
            tensor_count=len(rows),
            tensors=rows,
            derived_from=None,
            relation=None,
            created_at=actor.at,
            created_by=actor.name,
        )
        session.add(base)
        session.flush()
        audit.record(session, actor, Act.BASE_ADD, base.digest, namespace=None, after={"name": base.name})
    _add_aliases(session, actor, base, new.aliases if created else [*new.aliases, new.name])
    _add_locations(session, actor, base, new.locations)
    session.flush()
    return base, created


def find(session: Session, text: str) -> Base:
    """By digest (12 digits or more), by name or by alias. No name may look like a digest, so that none can hide one."""
    if _DIGEST_LIKE.fullmatch(text):
        matches = session.scalars(select(Base).where(Base.digest.between(text, text.ljust(64, "g"))).limit(2)).all()
        if len(matches) > 1:
            raise Usage(
                "base_ambiguous", f"Several bases begin with {text}.", subject=text, next_step="Give more digits."
            )
        found = matches[0] if matches else None
    else:
        of_alias = select(BaseAlias.base_digest).where(BaseAlias.alias == text)
        found = session.scalars(select(Base).where(or_(Base.name == text, Base.digest.in_(of_alias)))).first()
    if found is None:
        raise NotFound(
            "base_unknown",
            f"There is no base {text!r}.",
            subject=text,
            next_step="Register it with `adaptory base add DIR --name NAME`; `adaptory base list` shows those known.",
        )
    return found


def architecture(session: Session, digest: str) -> Architecture:
    """What an adapter is checked against."""
    base = session.scalars(select(Base).where(Base.digest == digest).options(undefer(Base.tensors))).one()
    return Architecture(
        base.model_type, base.tied, {name: TensorSpec(dtype, tuple(shape)) for name, dtype, shape, _ in base.tensors}
    )


def aliases(session: Session, base: Base) -> list[str]:
    return list(
        session.scalars(select(BaseAlias.alias).where(BaseAlias.base_digest == base.digest).order_by(BaseAlias.alias))
    )


def locations(session: Session, base: Base) -> list[str]:
    return list(
        session.scalars(
            select(BaseLocation.url).where(BaseLocation.base_digest == base.digest).order_by(BaseLocation.url)
        )
    )


def list_page(session: Session, *, after: str, limit: int) -> list[Base]:
    return list(session.scalars(select(Base).where(Base.name > after).order_by(Base.name).limit(limit)))


def _refuse_taken_name(session: Session, new: NewBase) -> None:
    if _DIGEST_LIKE.fullmatch(new.name):
        raise Usage(
            "bad_name",
            f"{new.name!r} looks like a digest.",
            subject=new.name,
            next_step="Choose a name that says what it is.",
        )
    other = session.scalar(select(Base.digest).where(Base.name == new.name))
    other = other or session.scalar(select(BaseAlias.base_digest).where(BaseAlias.alias == new.name))
    if other:
        raise Conflict(
            "base_name_taken",
            f"{new.name!r} names the base {other[:12]}, whose weights differ.",
            subject=new.name,
            next_step="Choose another --name.",
        )


def _add_aliases(session: Session, actor: Actor, base: Base, wanted: Sequence[str]) -> None:
    for alias in wanted:
        if not _ALIAS.fullmatch(alias) or _DIGEST_LIKE.fullmatch(alias):
            raise Usage(
                "bad_alias",
                f"{alias[:80]!r} cannot be an alias.",
                subject=alias[:80],
                next_step="Use letters, digits and . _ - /, and not the form of a digest.",
            )
        owner = session.scalar(select(Base.digest).where(Base.name == alias))
        row = session.get(BaseAlias, alias)
        owner = owner or (row.base_digest if row else None)
        if owner is None:
            session.add(BaseAlias(alias=alias, base_digest=base.digest))
            session.flush()
            audit.record(session, actor, Act.BASE_UPDATE, base.digest, namespace=None, after={"alias": alias})
        elif owner != base.digest:
            raise Conflict(
                "alias_taken",
                f"{alias!r} names the base {owner[:12]}, whose weights differ.",
                subject=alias,
                next_step="Choose another alias.",
            )


def _add_locations(session: Session, actor: Actor, base: Base, wanted: Sequence[str]) -> None:
    for url in wanted:
        if not url.startswith(_SCHEMES) or len(url) > 1000:
            raise Usage(
                "bad_location",
                f"{url[:120]!r} is not a location.",
                subject=url[:120],
                next_step=f"Begin it with one of {', '.join(_SCHEMES)}.",
            )
        if session.get(BaseLocation, (base.digest, url)) is None:
            session.add(BaseLocation(base_digest=base.digest, url=url))
            session.flush()
            audit.record(session, actor, Act.BASE_UPDATE, base.digest, namespace=None, after={"location": url})
