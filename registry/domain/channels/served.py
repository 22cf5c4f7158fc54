"""Which channels serve which releases, for lists of releases of many repositories."""

from collections.abc import Collection, Mapping

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry.database.dialects import in_list, padded
from registry.database.prepared import Prepared
from registry.database.tables import Channel, Release

_channel, _release = Channel.__table__.c, Release.__table__.c
# By way of the repository, which has an index; on columns, since mapped objects would take most of the time.
_SERVED = Prepared(
    select(_channel.served_id, _channel.name)
    .select_from(Release.__table__)
    .join(
        Channel.__table__,
        (_channel.repository_id == _release.repository_id) & (_channel.served_id == _release.id),
    )
    .where(in_list(_release.id, "releases"))
    .order_by(_channel.name)
)


def channels_of(session: Session, releases: Collection[int]) -> Mapping[int, list[str]]:
    """By id of these releases, the names of the channels that serve it now, in order.

    The caller has checked that they may be read.
    """
    serving: dict[int, list[str]] = {}
    for release, channel in _SERVED.rows(session, {"releases": padded(list(releases))}):
        serving.setdefault(release, []).append(channel)
    return serving
