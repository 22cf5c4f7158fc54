"""The adapters on a base, for an upgrade to another base."""

from collections.abc import Sequence

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from registry.database.tables import Base, Channel, Release, Repository
from registry.domain.access.audit import Actor
from registry.domain.access.roles import readable
from registry.domain.catalog.repositories import Kind
from registry.errors import Invalid

MAX_ADAPTERS = 500


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
            next_step="Upgrade in parts, with tokens that read fewer namespaces.",
        )
    return rows


def channels_of(session: Session, release: Release) -> list[str]:
    """The channels that serve the release."""
    return list(session.scalars(select(Channel.name).where(Channel.served_id == release.id).order_by(Channel.name)))
