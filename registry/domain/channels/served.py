"""Which channels serve which releases, for lists of releases of many repositories."""

from collections.abc import Iterable

from sqlalchemy import select, tuple_
from sqlalchemy.orm import Session

from registry.database.tables import Channel, Release, Repository


def channels_of(session: Session, releases: Iterable[tuple[str, str]]) -> dict[tuple[str, str], list[str]]:
    """By repository and version of these releases, the names of the channels that serve it now, in order.

    The caller has checked that they may be read.
    """
    wanted = set(releases)
    names = {tuple(repository.split("/")) for repository, _ in wanted}
    query = (
        select(Repository.namespace, Repository.name, Release.version, Channel.name)
        .join(Release, Release.id == Channel.served_id)
        .join(Repository, Repository.id == Channel.repository_id)
        .where(tuple_(Repository.namespace, Repository.name).in_(names))
        .order_by(Channel.name)
    )
    serving: dict[tuple[str, str], list[str]] = {}
    for namespace, name, version, channel in session.execute(query):
        if (release := (f"{namespace}/{name}", version)) in wanted:
            serving.setdefault(release, []).append(channel)
    return serving
