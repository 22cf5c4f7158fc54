"""Figures of canaries from a Prometheus whose address the operator sets.

Only that address is requested, redirects are not followed, and time and size are bounded. What cannot be read is not
reported, so that the canary is held.
"""

import logging
import time
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Mapping
from datetime import datetime
from typing import Any, cast

import httpx2

from registry.domain.access.audit import Actor
from registry.domain.access.roles import REGISTRY
from registry.domain.rollouts import canaries
from registry.domain.rollouts.canaries import BOUNDS_S, VersionFigures, Watched
from registry.environment.sections import PrometheusSettings
from registry.errors import Refused
from registry.errors.outages import OutageLog
from registry.transfer.issuer_keys import FETCH_ERRORS, FETCH_S, fetch_table, issuer_client, reason
from registry.transfer.resources import Resources

SOURCE = "prometheus"
_MOST = 2**53
outages = OutageLog(logging.getLogger(__name__))

Sample = tuple[Mapping[str, str], float]


def measure_canaries(resources: Resources) -> None:
    """Reports what Prometheus has counted of both releases of each running canary since it began. Does nothing without
    a Prometheus in the settings."""
    settings = resources.settings.prometheus
    if settings is None:
        return
    with resources.read() as session:
        running = canaries.watched(session)
    for watched in running:
        asked_at = resources.clock()
        try:
            with issuer_client() as http:
                own, served = (_figures(http, settings, watched, version, asked_at) for version in watched.versions)
        except FETCH_ERRORS as error:
            outages.warn(f"The figures of {watched.channel} could not be read from Prometheus", reason(error))
            if isinstance(error, httpx2.TransportError):
                return  # the others would wait, too
            continue
        if not own.requests + served.requests:
            continue
        try:
            with resources.write() as session:
                actor = Actor(REGISTRY, resources.clock(), {})
                canaries.measure(session, actor, watched, SOURCE, asked_at, (own, served))
        except Refused as error:
            outages.warn(f"The figures of {watched.channel} in Prometheus do not count", error.detail)


def _figures(
    http: httpx2.Client, settings: PrometheusSettings, watched: Watched, version: str, at: datetime
) -> VersionFigures:
    """The figures of a version at one time, so that all counts have the same requests. Times of the candidate count at
    the lower end of their bucket and those of the served release at its upper end, so that the width of a bucket breaks
    no rule."""
    values = {
        "$model": f"{watched.channel.repository}@{version}",
        "$version": version,
        "$channel": str(watched.channel),
        "$since": f"{max(1, int((at - watched.began_at).total_seconds()))}s",
    }

    def asked(query: str) -> list[Sample]:
        for name, value in values.items():
            query = query.replace(name, value)
        return _samples(http, settings, query, at) if query else []

    requests, errors = (round(sum(value for _, value in asked(text))) for text in (settings.requests, settings.errors))
    seconds = _seconds(asked(settings.seconds), lowest=version == watched.versions[0])
    return VersionFigures(max(requests, errors, sum(seconds.values())), errors, seconds)


def _seconds(buckets: list[Sample], *, lowest: bool) -> dict[int, int]:
    """Counts by index into `BOUNDS_S`, from cumulative ones by `le`."""
    counts, below, lower_s = Counter[int](), 0, 0.0
    for upper_s, count in sorted((float(labels.get("le", "+Inf")), round(count)) for labels, count in buckets):
        index = bisect_right(BOUNDS_S, lower_s) if lowest else bisect_left(BOUNDS_S, upper_s)
        counts[index] += max(0, count - below)
        below, lower_s = max(below, count), upper_s
    return {index: count for index, count in counts.items() if count}


def _samples(http: httpx2.Client, settings: PrometheusSettings, query: str, at: datetime) -> list[Sample]:
    """The labels and values of the answer to a query. Raises one of FETCH_ERRORS for anything but a vector of
    counts, and for what Prometheus cannot compute (NaN): errors that are not known are not none."""
    headers = {"Authorization": f"Bearer {settings.token.get_secret_value()}"} if settings.token else {}
    deadline = time.monotonic() + FETCH_S
    params = {"query": query, "time": f"{at.timestamp():.3f}"}
    status, table = fetch_table(http, "GET", f"{settings.url}/api/v1/query", deadline, params=params, headers=headers)
    if status != 200:
        raise ValueError(f"it answers {status} {str(table.get('error', ''))[:200]}".rstrip())
    try:
        data = cast("dict[str, Any]", table["data"])
        if data["resultType"] != "vector":
            raise ValueError(f"{query[:100]!r} answers no vector")
        samples: list[Sample] = [(dict(row["metric"]), float(row["value"][1])) for row in data["result"]]
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError("its answer is not that of a query") from error
    if any(not 0 <= value <= _MOST for _, value in samples):
        raise ValueError(f"{query[:100]!r} answers something that is not a count")
    return samples
