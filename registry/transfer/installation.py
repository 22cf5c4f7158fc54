"""Checks an installation end to end: directories, packages, database, store, contents, workers and bases."""

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from registry.database.engine import Database, DatabaseTimeouts, Row
from registry.database.migrate import ensure_schema, head_revision, schema_revision
from registry.database.tables import Blob, Job, Token
from registry.domain.access import publishers
from registry.domain.catalog import bases
from registry.domain.channels.policy import policies
from registry.domain.jobs import queue
from registry.environment.home import close_directory
from registry.environment.settings import LocalStorage, S3Storage, Settings
from registry.errors import RegistryError
from registry.formats.references import ABSENT
from registry.transfer import fsck
from registry.transfer.resources import Resources, open_resources
from registry.transfer.store_facts import probe_of

State = Literal["ok", "warning", "error"]
LEAST_FREE_BYTES = 1 << 30
CLOCK_S = 5.0
"""Leases and expiries compare times of several machines."""
WAITING = timedelta(minutes=10)
"""The age after which a queued job without a running worker is reported."""
REMOVING = timedelta(days=1)
NEWEST_JOBS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """The result of a check; `next_step` is empty if it is ok."""

    name: str
    state: State
    detail: str
    next_step: str = ""


def check_installation(settings: Settings, *, contents: bool, progress: fsck.Progress) -> Iterator[Check]:
    """Checks the installation that the settings describe; with `contents`, every row and every blob's size too.

    Changes nothing, but that a store is probed anew and an empty embedded database is created. Checks that depend on an
    unusable directory or database are skipped.
    """
    failed = False
    for check in (_check_directories, _check_packages, _check_database):
        for result in _caught(check.__name__, lambda check=check: check(settings)):
            failed = failed or result.state == "error"
            yield result
    if failed:
        return
    resources = open_resources(settings)
    try:
        yield from _caught("store", lambda: _check_store(resources))
        if contents:
            yield from _caught("contents", lambda: _check_contents(resources, progress))
        for check in (_check_access, _check_publishers, _check_policies, _check_workers, _check_removals, _check_bases):
            yield from _caught(check.__name__, lambda check=check: check(resources))
    finally:
        resources.close()


def _caught(name: str, check: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    """The checks; an error becomes a failed check."""
    try:
        yield from check()
    except RegistryError as error:
        yield Check(name=name.removeprefix("_check_"), state="error", detail=error.detail, next_step=error.next_step)


def _check_directories(settings: Settings) -> Iterator[Check]:
    directories = {"home directory": settings.home_directory, "work directory": settings.work_directory}
    if isinstance(settings.storage, LocalStorage):
        directories["blob directory"] = settings.store_directory
    for name, directory in directories.items():
        try:
            if not directory.exists():
                close_directory(directory)
            with TemporaryFile(dir=directory):
                free = shutil.disk_usage(directory).free
        except OSError as error:
            detail = f"{directory} cannot be written: {error.strerror}."
            yield Check(name=name, state="error", detail=detail, next_step="Give this user write access to it.")
            continue
        state: State = "ok" if free >= LEAST_FREE_BYTES else "warning"
        detail = f"{directory}, {free / 1e9:.1f} GB free"
        yield Check(name=name, state=state, detail=detail, next_step="" if state == "ok" else "Make room on this disk.")


def _check_packages(settings: Settings) -> Iterator[Check]:
    needed = {
        "psycopg": ("postgres", (settings.database_url or "").startswith("postgresql")),
        "boto3": ("s3", isinstance(settings.storage, S3Storage)),
        "joserfc": ("oidc", bool(settings.oidc_audience) or settings.sign_in is not None),
        "cryptography": ("sign", settings.signing_key is not None),
    }
    missing = [extra for package, (extra, wanted) in needed.items() if wanted and find_spec(package) is None]
    if missing:
        step = f"Install adaptory[{','.join(missing)}]."
        yield Check(
            name="packages", state="error", detail="The settings need packages that are absent.", next_step=step
        )
        return
    works = "" if find_spec("torch") else "; without torch this machine serves, and runs no jobs"
    yield Check(name="packages", state="ok", detail=f"what the settings need is installed{works}")


def _check_database(settings: Settings) -> Iterator[Check]:
    patience = DatabaseTimeouts(settings.database_connect_timeout_s, settings.database_timeout_s)
    database = Database(settings.effective_database_url, patience, settings.database_pool_size)
    try:
        named = database.shown_url
        ensure_schema(database, create=settings.database_url is None)
        began = time.perf_counter()
        with database.read() as session:
            version, offset, most = _server_facts(session, sqlite=database.is_sqlite)
        took_ms = (time.perf_counter() - began) * 1e3
        schema = schema_revision(database) or "none"
        detail = f"{named}, {version}, schema {schema} of {head_revision()}, {took_ms:.0f} ms"
        yield Check(name="database", state="ok", detail=detail)
        if abs(offset) > CLOCK_S:
            detail = f"The database's clock is {offset:+.0f} s from this machine's."
            yield Check(name="clock", state="warning", detail=detail, next_step="Set both by NTP.")
        if most is not None and most < 2 * settings.database_pool_size:
            detail = (
                f"PostgreSQL takes {most} connections; each process here opens up to {settings.database_pool_size}."
            )
            step = "Raise max_connections, lower ADAPTORY_DATABASE_POOL_SIZE, or use PgBouncer."
            yield Check(name="connections", state="warning", detail=detail, next_step=step)
    finally:
        database.close()


def _server_facts(session: Session, *, sqlite: bool) -> tuple[str, float, int | None]:
    """Version, its clock minus this machine's in seconds, and the most connections that it allows."""
    if sqlite:
        return f"SQLite {session.scalar(text('SELECT sqlite_version()'))}", 0.0, None
    version = str(session.scalar(text("SHOW server_version"))).partition(" ")[0]
    there = float(session.scalar(text("SELECT extract(epoch FROM clock_timestamp())")) or 0)
    return f"PostgreSQL {version}", there - time.time(), int(session.scalar(text("SHOW max_connections")) or 0)


def _check_store(resources: Resources) -> Iterator[Check]:
    began = time.perf_counter()
    resources.store.stat(ABSENT)
    took_ms = (time.perf_counter() - began) * 1e3
    probe = probe_of(resources.store)
    kind = resources.settings.storage.kind
    if probe is None:
        yield Check(name="store", state="ok", detail=f"{kind}, {took_ms:.0f} ms")
        return
    probe.probe()
    way = "straight to their blobs" if probe.allows_in_place() else "to incoming/, where they are checked and copied"
    yield Check(name="store", state="ok", detail=f"{kind}, {took_ms:.0f} ms; clients upload {way}")


def _check_contents(resources: Resources, progress: fsck.Progress) -> Iterator[Check]:
    findings = fsck.check(resources, progress=progress)
    broken = Counter(finding.code for finding in findings if finding.severity == "error")
    if broken:
        codes = ", ".join(f"{code} ({count:,})" for code, count in broken.most_common())
        yield Check(name="contents", state="error", detail=codes, next_step="Run `adaptory fsck`: it names each.")
        return
    extent = fsck.extent(resources)
    yield Check(name="contents", state="ok", detail=f"{', '.join(extent.contents)}; sizes only")


def _check_access(resources: Resources) -> Iterator[Check]:
    kind = resources.settings.access
    if kind == "single":
        yield Check(name="access", state="ok", detail="single: one user, on this machine")
        return
    now = resources.clock()
    with resources.read() as session:
        usable = select(Token.id).where(Token.revoked_at.is_(None), ~Token.session)
        usable = usable.where((Token.expires_at.is_(None)) | (Token.expires_at > now))
        there = session.scalar(usable.limit(1)) is not None
    if there or resources.settings.sign_in is not None:
        yield Check(name="access", state="ok", detail="tokens")
    else:
        step = "Grant yourself admin in `*` and make a token: `adaptory namespace grant '*' YOU admin`."
        yield Check(name="access", state="warning", detail="tokens, and none exists.", next_step=step)


def _check_policies(resources: Resources) -> Iterator[Check]:
    """Warns about policies whose required approval can be bypassed."""
    with resources.read() as session:
        forced = policies.forced_past_approval(session)
    if forced:
        ask = f"{len(forced):,} policies require an approval" if len(forced) > 1 else "1 policy requires an approval"
        detail = f"{ask} that a releaser can bypass: {', '.join(forced[:5])}."
        step = "Remove `force: releaser`; the default is never: `adaptory policy set REPO@CHANNEL FILE`."
        yield Check(name="policies", state="warning", detail=detail, next_step=step)


def _check_publishers(resources: Resources) -> Iterator[Check]:
    """Warns about trusted publishers of GitHub without a workflow, which new ones must name."""
    issuers = [url for url, layout in resources.settings.issuers.items() if layout == "github"]
    with resources.read() as session:
        names = [f"{row.namespace}/{row.repository}" for row in publishers.without_workflow(session, issuers)]
    if names:
        detail = f"{len(names):,} trusted publishers allow any workflow of their project: {', '.join(names[:5])}."
        step = "Add each again with --workflow, then remove the old one: `adaptory publisher list REPO`."
        yield Check(name="publishers", state="warning", detail=detail, next_step=step)


def _check_workers(resources: Resources) -> Iterator[Check]:
    now = resources.clock()
    with resources.read() as session:
        unfinished = queue.unfinished(session)
    counts = Counter[str]()
    for _, state, count, _ in unfinished:
        counts[state] += count
    at_work = counts["running"] > 0
    oldest = min((since for _, state, _, since in unfinished if state == "queued"), default=now)
    detail = f"{counts['queued']:,} jobs are queued" + (", one or more run" if at_work else "")
    if counts["stalled"]:
        detail = f"{detail}, and {counts['stalled']:,} stalled: their worker fell silent, and no other one took over."
        yield Check(name="workers", state="warning", detail=detail, next_step="Start one: `adaptory worker`.")
    elif now - oldest > WAITING and not at_work:
        minutes = (now - oldest) / timedelta(minutes=1)
        detail = f"{detail}, the oldest for {minutes:,.0f} minutes, and no worker runs one."
        yield Check(name="workers", state="warning", detail=detail, next_step="Start one: `adaptory worker`.")
    else:
        yield Check(name="workers", state="ok", detail=detail)


def _check_removals(resources: Resources) -> Iterator[Check]:
    old = Blob.removing_at < resources.clock() - REMOVING
    with resources.read() as session:
        count = session.scalar(select(func.count()).select_from(Blob).where(old)) or 0
    if count:
        detail = f"{count:,} blobs have been marked for removal for more than a day."
        yield Check(name="gc", state="warning", detail=detail, next_step="Run `adaptory gc`, which finishes them.")


def _check_bases(resources: Resources) -> Iterator[Check]:
    """Warns about bases without a location that this machine can read, since jobs on them cannot run here."""
    if find_spec("torch") is None:
        return
    with resources.read() as session:
        listed = bases.list_page(session, after="", limit=1_000)
        locations = bases.locations(session, *listed)
        absent = [row.name for row in listed if not any(map(_is_within_reach, locations[row.digest]))]
    if absent:
        detail = f"{len(absent):,} of {len(listed):,} bases have no location within reach: {', '.join(absent[:5])}."
        step = "Jobs on them need another machine, or `adaptory base add DIR --name NAME` here."
        yield Check(name="bases", state="warning", detail=detail, next_step=step)
    else:
        yield Check(name="bases", state="ok", detail=f"{len(listed):,}, each with a location within reach")


def _is_within_reach(location: str) -> bool:
    """Whether this machine can read the files; those on other hosts are assumed to exist."""
    parts = urlsplit(location)
    return parts.scheme != "file" or Path(unquote(parts.path)).is_dir()


def summarize_database(settings: Settings) -> dict[str, Any]:
    """Rows by table, and how the newest jobs ended; without names of namespaces, repositories and users."""
    database = Database(settings.effective_database_url)
    try:
        with database.read() as session:
            tables = Row.metadata.sorted_tables
            rows = {table.name: session.scalar(select(func.count()).select_from(table)) for table in tables}
            jobs = [_summary(job) for job in session.scalars(select(Job).order_by(Job.id.desc()).limit(NEWEST_JOBS))]
    except RegistryError as error:
        return {"error": error.code}
    finally:
        database.close()
    return {"rows": rows, "jobs": jobs}


def _summary(job: Job) -> dict[str, Any]:
    return {
        "id": job.id,
        "kind": job.kind,
        "state": job.state,
        "attempts": job.attempts,
        "error": job.error and job.error.get("code"),
        "created_at": job.created_at,
        "finished_at": job.finished_at,
        "steps": {step["name"]: step["state"] for step in job.steps},
    }
