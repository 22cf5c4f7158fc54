"""Base models: identified by their weights, found by digest, name or alias; and the adapters on them."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import ColumnElement, bindparam, func, or_, select, update
from sqlalchemy.orm import Session, undefer

from composer.formats.checkpoints.checkpoint import Architecture, TensorSpec
from composer.formats.checkpoints.hashing import architecture_digest, weights_digest
from composer.formats.checkpoints.header import DTYPE_BITS
from registry.database.prepared import Prepared
from registry.database.tables import Base, BaseAlias, BaseLocation, Channel, Release, Repository
from registry.database.tables.catalog import new_stamp
from registry.domain.access import audit
from registry.domain.access.audit import Act, Actor
from registry.domain.access.roles import Role, holds, permit, readable, refuse_other_owner
from registry.domain.catalog.repositories import Kind
from registry.errors import Conflict, Invalid, NotFound, Usage
from registry.formats.addresses import HUB_SCHEME, S3_SCHEME, parse_s3_address
from registry.formats.licenses import spdx
from registry.formats.references import MAX_NEAR, Digest, nearest, parse_name

RELATIONS = ("quantized", "cast", "finetuned", "merged")
SAME_MODEL = ("cast", "quantized")
"""Relations that preserve what a base computes, except for rounding: an adapter of one may work on the other."""
MAX_STEPS, MAX_RELATED = 4, 100
MAX_ADAPTERS = 500
MAX_PARAMETERS = 1 << 59
"""Limit so that sizes fit into a column; a million times the largest models."""
_ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,198}")
_DIGEST_LIKE = re.compile(r"[0-9a-f]{12,64}")
_FILE = "file://"
_SCHEMES = (_FILE, HUB_SCHEME, S3_SCHEME)

_base, _alias = Base.__table__.c, BaseAlias.__table__.c


def _called(name: ColumnElement[str]) -> ColumnElement[bool]:
    return or_(_base.name == name, _base.digest.in_(select(_alias.base_digest).where(_alias.alias == name)))


_BY_NAME = Prepared(select(_base.digest, _base.name).where(_called(bindparam("named"))).limit(2))


def is_name(text: str) -> bool:
    """Whether the text can be a name or alias, which are unique, and not a digest prefix, which may be ambiguous."""
    return _DIGEST_LIKE.fullmatch(text) is None


def digest_of(name: ColumnElement[str]) -> ColumnElement[str]:
    """A subquery for the digest of a name; it saves most searches a statement."""
    return select(_base.digest).where(_called(name)).limit(1).scalar_subquery()


@dataclass(frozen=True, slots=True)
class TensorRow:
    """One line of the tensor table: safetensors dtype, shape, sha256 of the raw little-endian bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: Digest


@dataclass(frozen=True, slots=True)
class NewBase:
    """A base to register. `derived_from` names another base, and `relation` how it was made from that one."""

    name: str
    model_type: str
    tied: bool
    tensors: Sequence[TensorRow]
    weights_digest: Digest
    aliases: Sequence[str] = ()
    locations: Sequence[str] = field(default=())
    derived_from: str | None = None
    relation: str | None = None
    license: str | None = None


def register(session: Session, actor: Actor, new: NewBase) -> tuple[Base, bool]:
    """Registers a base. Returns it and whether it is new. For a known base, adds aliases, locations and origin.

    Only its owner and admins may add them, since an alias decides what a push is checked against. Raises NotAllowed for
    others, unless everything they state is present already, and Conflict for a different model type or tying.
    """
    architecture = _checked_architecture(new)
    base = session.get(Base, new.weights_digest)
    created = base is None
    if base is None:
        base = _insert(session, actor, new, architecture)
    elif (base.model_type, base.tied) != (new.model_type, new.tied):
        raise Conflict(
            "base_differs",
            f"These weights are {base.name!r}, of model type {base.model_type!r} with tied={base.tied}, "
            f"not {new.model_type!r} with tied={new.tied}.",
            subject=new.name,
            next_step="Compare config.json with the one that the base was registered from.",
        )
    _add_aliases(session, actor, base, new.aliases if created else [*new.aliases, new.name])
    _add_locations(session, actor, base, new.locations)
    _add_relation(session, actor, base, new)
    _set_license(session, actor, base, new.license)
    session.flush()
    return base, created


def _checked_architecture(new: NewBase) -> Architecture:
    """The architecture from the tensor table, after checking that against the weights digest."""
    tensors = {row.name: TensorSpec(row.dtype, row.shape) for row in new.tensors}
    for row in new.tensors:
        if row.dtype not in DTYPE_BITS:
            raise Invalid(
                "unknown_dtype",
                f"{row.name} has the unknown dtype {row.dtype}.",
                subject=row.name,
                next_step=f"Name one of safetensors' dtypes: {', '.join(DTYPE_BITS)}.",
            )
    hashed = weights_digest((row.name, row.dtype, row.shape, row.sha256) for row in new.tensors)
    if len(tensors) != len(new.tensors) or hashed != new.weights_digest:
        raise Invalid(
            "digest_differs",
            "The weights digest does not match the tensor table.",
            subject=new.name,
            next_step="Hash the checkpoint again.",
        )
    if sum(spec.elements for spec in tensors.values()) > MAX_PARAMETERS:
        raise Invalid(
            "base_too_large", f"The tensor table of {new.name!r} states an impossible size.", subject=new.name
        )
    return Architecture(new.model_type, new.tied, tensors)


def _insert(session: Session, actor: Actor, new: NewBase, architecture: Architecture) -> Base:
    _refuse_taken_name(session, new)
    rows = sorted(new.tensors, key=lambda row: row.name)
    specs = architecture.tensors.values()
    base = Base(
        digest=new.weights_digest,
        architecture_digest=architecture_digest(architecture),
        name=parse_name(new.name, "base name"),
        model_type=new.model_type,
        tied=new.tied,
        parameters=sum(spec.elements for spec in specs),
        size_bytes=sum(spec.size_bytes for spec in specs),
        tensor_count=len(rows),
        tensors=[[row.name, row.dtype, list(row.shape), row.sha256] for row in rows],
        derived_from=None,
        relation=None,
        created_at=actor.at,
        created_by=actor.name,
    )
    session.add(base)
    session.flush()
    audit.record(session, actor, Act.BASE_ADD, base.digest, namespace=None, after={"name": base.name})
    return base


def _set_license(session: Session, actor: Actor, base: Base, license_: str | None) -> None:
    if license_ is None or spdx(license_) == base.license:
        return
    _refuse_stranger(actor, base)
    before = {"license": base.license} if base.license else None
    base.license = spdx(license_)
    _touch_releases(session, base)
    after = {"license": base.license}
    audit.record(session, actor, Act.BASE_UPDATE, base.digest, namespace=None, before=before, after=after)


def deprecate(session: Session, actor: Actor, base: Base, reason: str | None, successor: str | None) -> Base:
    """Deprecates a base, which blocks nothing; None as the reason undoes it. Only for its owner and registry admins."""
    _refuse_stranger(actor, base)
    follower = find(session, successor).digest if successor and reason is not None else None
    if follower == base.digest:
        raise own_successor(base.name)
    before = {"deprecated": base.deprecated_reason, "successor": base.successor}
    after = {"deprecated": reason, "successor": follower}
    if before != after:
        base.deprecated_reason, base.successor = reason, follower
        _touch_releases(session, base)
        audit.record(
            session,
            actor,
            Act.BASE_DEPRECATE,
            base.digest,
            namespace=None,
            reason=reason,
            before=before,
            after=after,
        )
    return base


def own_successor(name: str) -> Usage:
    """The error for a base or a release that is named as its own successor."""
    message = f"{name} cannot be its own successor."
    return Usage("own_successor", message, subject=name)


def _touch_releases(session: Session, base: Base) -> None:
    """Changes the stamps of its releases, whose documents describe the base."""
    session.flush()
    session.execute(update(Release).where(Release.base_digest == base.digest).values(stamp=new_stamp()))


def remove_alias(session: Session, actor: Actor, alias: str) -> Base:
    """Removes an alias; returns its base, which keeps its own name."""
    row = session.get(BaseAlias, alias)
    if row is None:
        raise NotFound("alias_unknown", f"No base has the alias {alias[:200]!r}.", subject=alias[:200])
    base = session.get_one(Base, row.base_digest)
    _refuse_stranger(actor, base)
    session.delete(row)
    session.flush()
    audit.record(session, actor, Act.BASE_UPDATE, base.digest, namespace=None, before={"alias": alias})
    return base


def find(session: Session, text: str) -> Base:
    """Finds a base by digest (12 or more digits), name or alias. No name may look like a digest."""
    return session.get_one(Base, identify(session, text)[0])


def is_known(session: Session, text: str) -> bool:
    """Whether the text names a registered base."""
    return len(_matches(session, text)) == 1


def identify(session: Session, text: str) -> tuple[str, str]:
    """(digest, name) of the base that `find` finds."""
    matches = _matches(session, text)
    if not matches:
        names = session.scalars(select(Base.name).order_by(Base.name).limit(MAX_NEAR))
        aliases = session.scalars(select(BaseAlias.alias).order_by(BaseAlias.alias).limit(MAX_NEAR))
        raise NotFound(
            "base_unknown",
            f"The base {text!r} does not exist.",
            subject=text,
            next_step=nearest(
                text,
                [*names, *aliases],
                "Register it with `adaptory base add DIR --name NAME`; `adaptory base list` shows the registered ones.",
            ),
        )
    if len(matches) > 1:
        raise Usage("base_ambiguous", f"Several bases have digests that begin with {text}.", subject=text)
    [(digest, name)] = matches
    return digest, name


def _matches(session: Session, text: str) -> Sequence[tuple[str, str]]:
    """(digest, name) of up to two bases with this name, alias or beginning of a digest."""
    if is_name(text):
        return [(digest, name) for digest, name in _BY_NAME.rows(session, {"named": text})]
    wanted = _base.digest.between(text, text.ljust(64, "g"))
    return session.execute(select(_base.digest, _base.name).where(wanted).limit(2)).all()


def architecture(session: Session, digest: str) -> Architecture:
    """The architecture that adapters are checked against."""
    base = session.scalars(select(Base).where(Base.digest == digest).options(undefer(Base.tensors))).one()
    return Architecture(
        base.model_type, base.tied, {name: TensorSpec(dtype, tuple(shape)) for name, dtype, shape, _ in base.tensors}
    )


def aliases(session: Session, digests: Collection[str]) -> dict[str, list[str]]:
    """Aliases of bases by digest, with one query for a page of them, as in the functions below."""
    return _by_digest(session, BaseAlias.base_digest, BaseAlias.alias, digests)


def names(session: Session, digest: str) -> list[str]:
    """The name of a base, and its aliases."""
    return [session.get_one(Base, digest).name, *aliases(session, [digest]).get(digest, [])]


def locations(session: Session, *listed: Base) -> dict[str, list[str]]:
    """The locations of each base, by digest."""
    return _by_digest(session, BaseLocation.base_digest, BaseLocation.url, [base.digest for base in listed])


def origins(session: Session, *listed: Base) -> dict[str, str]:
    """Names of the bases that these were derived from, and of their successors, by their digests."""
    named = {digest for base in listed for digest in (base.derived_from, base.successor)}
    query = select(Base.digest, Base.name).where(Base.digest.in_(named))
    return dict(session.execute(query).all())


def _by_digest(session: Session, digest: Any, text: Any, digests: Collection[str]) -> dict[str, list[str]]:
    texts: dict[str, list[str]] = {key: [] for key in digests}
    for of, name in session.execute(select(digest, text).where(digest.in_(texts)).order_by(text)):
        texts[of].append(name)
    return texts


def related(session: Session, digest: str) -> dict[str, str]:
    """The base's digest (mapped to "") and those that casts and quantizations link to it, in either direction, mapped
    to the relations on the way, as in `quantized, cast`. At most `MAX_STEPS` relations away and `MAX_RELATED` bases."""
    relations: dict[str, str] = {digest: ""}
    edge = [digest]
    for _ in range(MAX_STEPS):
        touching = or_(Base.digest.in_(edge), Base.derived_from.in_(edge))
        links = select(Base.digest, Base.derived_from, Base.relation).where(touching, Base.relation.in_(SAME_MODEL))
        reached: dict[str, str] = {}
        for made, origin, relation in session.execute(links.order_by(Base.digest).limit(MAX_RELATED)):
            for here, there in ((made, origin or ""), (origin or "", made)):
                if here in relations and there not in relations:
                    reached[there] = ", ".join(part for part in (relations[here], relation) if part)
        edge = list(reached)[: MAX_RELATED - len(relations)]
        relations |= {there: reached[there] for there in edge}
        if not edge:
            break
    return relations


def list_page(session: Session, *, after: str, limit: int) -> list[Base]:
    """A page of bases by name, from the first name after `after` on."""
    return list(session.scalars(select(Base).where(Base.name > after).order_by(Base.name).limit(limit)))


def _refuse_taken_name(session: Session, new: NewBase) -> None:
    if _DIGEST_LIKE.fullmatch(new.name):
        raise Usage("bad_name", f"{new.name!r} looks like a digest.", subject=new.name)
    other = session.scalar(select(Base.digest).where(Base.name == new.name))
    other = other or session.scalar(select(BaseAlias.base_digest).where(BaseAlias.alias == new.name))
    if other:
        raise Conflict(
            "base_name_taken", f"{new.name!r} names the base {other[:12]}, whose weights differ.", subject=new.name
        )


def _refuse_stranger(actor: Actor, base: Base) -> None:
    refuse_other_owner(actor, f"base {base.name}", base.created_by, f"use it as it is, by the name {base.name}")


def _add_aliases(session: Session, actor: Actor, base: Base, wanted: Sequence[str]) -> None:
    for alias in wanted:
        if not _ALIAS.fullmatch(alias) or _DIGEST_LIKE.fullmatch(alias):
            raise Usage("bad_alias", f"{alias[:80]!r} is not allowed as an alias.", subject=alias[:80])
        owner = session.scalar(select(Base.digest).where(Base.name == alias))
        row = session.get(BaseAlias, alias)
        owner = owner or (row.base_digest if row else None)
        if owner is None:
            _refuse_stranger(actor, base)
            session.add(BaseAlias(alias=alias, base_digest=base.digest))
            session.flush()
            audit.record(session, actor, Act.BASE_UPDATE, base.digest, namespace=None, after={"alias": alias})
        elif owner != base.digest:
            raise Conflict(
                "alias_taken", f"{alias!r} names the base {owner[:12]}, whose weights differ.", subject=alias
            )


def _add_locations(session: Session, actor: Actor, base: Base, wanted: Sequence[str]) -> None:
    for url in wanted:
        if not url.startswith(_SCHEMES) or len(url) > 1000:
            raise Usage(
                "bad_location",
                f"{url[:120]!r} is not a valid location.",
                subject=url[:120],
                next_step=f"Begin it with one of {', '.join(_SCHEMES)}.",
            )
        if url.startswith(S3_SCHEME):
            parse_s3_address(url)
        if session.get(BaseLocation, (base.digest, url)) is None:
            _refuse_stranger(actor, base)
            if url.startswith((_FILE, S3_SCHEME)):
                permit(actor, Role.ADMIN)  # workers read from there with their own rights and credentials
            session.add(BaseLocation(base_digest=base.digest, url=url))
            session.flush()
            audit.record(session, actor, Act.BASE_UPDATE, base.digest, namespace=None, after={"location": url})


def _add_relation(session: Session, actor: Actor, base: Base, new: NewBase) -> None:
    if new.derived_from is None and new.relation is None:
        return
    if new.derived_from is None or new.relation not in RELATIONS:
        raise Usage(
            "bad_relation",
            f"{new.name!r} must state both what it is derived from and how.",
            subject=new.name,
            next_step=f"Name a registered base, and one of {', '.join(RELATIONS)}.",
        )
    origin = find(session, new.derived_from)
    if (base.derived_from, base.relation) == (origin.digest, new.relation):
        return
    _refuse_stranger(actor, base)
    if base.derived_from is not None and not holds(actor, Role.ADMIN):
        raise Conflict(
            "relation_known",
            f"{base.name!r} is already {base.relation} from the base {base.derived_from[:12]}.",
            subject=base.name,
        )
    if base.digest in _origins(session, origin):
        raise Invalid("relation_circular", f"{origin.name!r} is itself derived from {base.name!r}.", subject=base.name)
    if new.relation == "cast" and base.architecture_digest != origin.architecture_digest:
        raise Invalid(
            "not_a_cast",
            f"{base.name!r} is not a cast of {origin.name!r}: its tensors or shapes differ.",
            subject=base.name,
        )
    before = {"derived_from": base.derived_from, "relation": base.relation} if base.derived_from else None
    base.derived_from, base.relation = origin.digest, new.relation
    session.flush()
    after = {"derived_from": origin.digest, "relation": new.relation}
    audit.record(session, actor, Act.BASE_UPDATE, base.digest, namespace=None, before=before, after=after)


def _origins(session: Session, base: Base) -> set[str]:
    """Digests of the base and all its origins."""
    digests = {base.digest}
    while base.derived_from is not None and base.derived_from not in digests:
        digests.add(base.derived_from)
        base = session.get_one(Base, base.derived_from)
    return digests


def adapters_on(session: Session, actor: Actor, base: Base) -> Sequence[Release]:
    """The adapters in use on a base that the actor may read: the highest stable release of each repository, and what
    channels serve. Raises Invalid for more than MAX_ADAPTERS."""
    top = select(Release.repository_id, func.max(Release.sort_key).label("sort_key"))
    top = top.where(Release.stable, ~Release.yanked).group_by(Release.repository_id).subquery()
    is_top = (Release.repository_id == top.c.repository_id) & (Release.sort_key == top.c.sort_key)
    served = select(Channel.id).where(Channel.served_id == Release.id).exists()
    query = select(Release).join(Repository, Repository.id == Release.repository_id).outerjoin(top, is_top)
    query = query.where(Release.base_digest == base.digest, ~Release.yanked, Repository.kind == Kind.ADAPTER)
    query = query.where(readable(actor, Repository.namespace), top.c.sort_key.is_not(None) | served)
    query = query.order_by(Repository.namespace, Repository.name, Release.sort_key.desc())
    rows = session.scalars(query.limit(MAX_ADAPTERS + 1)).unique().all()
    if len(rows) > MAX_ADAPTERS:
        raise Invalid(
            "too_many_adapters",
            f"More than {MAX_ADAPTERS} adapters use {base.name}.",
            subject=base.name,
        )
    return rows


def channels_of(session: Session, release: Release) -> list[str]:
    """The channels that serve the release."""
    return list(session.scalars(select(Channel.name).where(Channel.served_id == release.id).order_by(Channel.name)))
