"""Judges waiting promotions again: each in a transaction of its own."""

import logging
from collections.abc import Sequence

from registry.domain.catalog import repositories
from registry.domain.catalog.repositories import Kind
from registry.domain.channels import pending, promotions
from registry.errors import Unavailable
from registry.formats.references import RepositoryName
from registry.transfer.resources import Resources

log = logging.getLogger(__name__)


def settle_due(resources: Resources) -> None:
    """Settles the promotions that are due to be judged again."""
    with resources.read() as session:
        due = pending.due(session, resources.clock())
    _settle(resources, due)


def settle_on_base(resources: Resources, digest: str) -> None:
    """Settles the promotions that a score measured on this base may decide."""
    with resources.read() as session:
        waiting = pending.on_base(session, digest)
    _settle(resources, waiting)


def settle_overdue(resources: Resources, name: RepositoryName, kind: Kind | None, channel: str) -> None:
    """Ends the channel's promotion if it has expired. Called when the promotion is read, in case no worker has done
    so."""
    with resources.read() as session:
        waiting = pending.overdue(session, repositories.find(session, name, kind), channel, resources.clock())
    settle(resources, waiting)


def settle(resources: Resources, promotion_id: int | None) -> None:
    """Settles one promotion, if any."""
    _settle(resources, [] if promotion_id is None else [promotion_id])


def _settle(resources: Resources, waiting: Sequence[int]) -> None:
    for promotion_id in waiting:
        try:
            with resources.write() as session:
                promotions.settle(session, promotion_id, resources.clock())
        except Unavailable as error:  # a worker will try again
            log.warning("Promotion %s could not be judged: %s", promotion_id, error)
