"""Maintenance: gc, fsck and storage check. They access the database and the store directly, beside running servers."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from registry.cli.console import render
from registry.cli.console.connect import own_settings
from registry.cli.console.groups import group, root
from registry.cli.console.render import JsonFlag
from registry.errors import RegistryError

if TYPE_CHECKING:
    from composer.findings import Finding
    from registry.transfer.fsck import Extent
    from registry.transfer.resources import Resources


storage = group("storage", "Inspect the blob store.")


@storage.command("check")
def check_storage(json: JsonFlag = False) -> None:
    """Probe which checks the blob store makes on uploads, and record them for all servers.

    The first server or push does so once for each store. Repeat it after the store or a proxy before it has changed.
    """
    from dataclasses import asdict

    from registry.transfer.store_facts import probe_of

    with own_resources() as resources:
        kind, probe = resources.settings.storage.kind, probe_of(resources.store)
        facts = asdict(probe.probe()) if probe is not None else None
        in_place = probe is not None and probe.allows_in_place()
    document = {"kind": kind, "verifies": facts, "in_place": in_place}

    def show() -> None:
        if facts is None:
            render.out("The store is a directory: the registry hashes every file that it writes, so nothing is probed.")
            return
        verified = [("sha256 of files", "bodies"), ("sha256 of parts", "parts"), ("signed expiry", "signed_end")]
        rows = [(label, "verified by the store" if facts[name] else "not verified") for label, name in verified]
        uploads = "straight to their blobs" if in_place else "to incoming/, checked and copied"
        render.lines(kind, [*rows, ("clients upload", uploads)])

    render.document(document, json, show)


@root.command()
def gc(
    grace_hours: Annotated[
        float, typer.Option(min=0, help="Keep anything younger; no push may take longer than this.")
    ] = 24.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count commits, jobs, blobs and uploads.")] = False,
    json: JsonFlag = False,
) -> None:
    """Remove old commits without a release, unfinished uploads and unused blobs. Safe while others push and pull.

    First applies the retention of each namespace (`adaptory namespace retention`), and removes jobs that
    ended ADAPTORY_JOB_RETENTION_DAYS ago.
    """
    from registry.transfer.collect import collect
    from registry.worker.host import sweep_work

    with own_resources() as resources:
        removed = collect(resources, grace=timedelta(hours=grace_hours), dry_run=dry_run)
        if not dry_run:
            removed.leftovers += sweep_work(resources)
    document = {
        "releases": removed.releases,
        "loaded": removed.loaded,
        "jobs": removed.jobs,
        "commits": removed.commits,
        "blobs": removed.blobs,
        "size_bytes": removed.size_bytes,
        "unfinished": removed.unfinished,
        "leftovers": removed.leftovers,
        "dry_run": dry_run,
    }
    verb = "would remove" if dry_run else "removed"
    counts = f"{removed.blobs:,} blobs ({render.size(removed.size_bytes)}), {removed.unfinished:,} unfinished uploads"
    more = f", {removed.leftovers:,} leftovers" if removed.leftovers else ""
    more += f", {removed.commits:,} commits" if removed.commits else ""
    more += f", {removed.releases:,} releases by retention" if removed.releases else ""
    more += f", {removed.jobs:,} finished jobs" if removed.jobs else ""
    more += f"; {render.counted(removed.loaded, 'release')} stayed, loaded on nodes" if removed.loaded else ""
    render.document(document, json, lambda: render.out(f"{verb} {counts}{more}"))


@root.command()
def fsck(
    full: Annotated[
        bool, typer.Option("--full", help="Read and hash every blob instead of checking only its size.")
    ] = False,
    discard: Annotated[
        bool, typer.Option("--discard", help="Delete damaged blobs, so that pushing the same files sends them again.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Check the registry's integrity; changes nothing without --discard. Exits 1 if a check fails."""
    with own_resources() as resources:
        check = FsckResult.of(resources, read_bytes=full)
        failure = check.discard(resources) if discard else None
    document = check.to_json()
    if discard:
        document["discarded"] = check.discarded
    if failure is not None:
        document["error"] = render.problem(failure)
    render.document(document, json, check.show, failure)
    if check.broken:
        raise typer.Exit(1)


@dataclass(slots=True)
class FsckResult:
    """The findings of fsck, and the discarded files."""

    extent: "Extent"
    findings: "list[Finding]"
    database_url: str
    read_bytes: bool
    discarded: list[str] = field(default_factory=list[str])

    @classmethod
    def of(cls, resources: "Resources", *, read_bytes: bool) -> "FsckResult":
        from registry.transfer import fsck as promises

        extent, database_url = promises.extent(resources), resources.database.shown_url
        with render.progress("fsck", extent.steps, "rows") as done:
            findings = promises.check(resources, read_bytes=read_bytes, progress=done)
        return cls(extent, findings, database_url, read_bytes)

    @property
    def broken(self) -> int:
        return sum(finding.severity == "error" for finding in self.findings)

    def discard(self, resources: "Resources") -> RegistryError | OSError | None:
        """Deletes damaged blobs. Returns a failure: the findings, which may have taken hours, are shown before it."""
        from registry.transfer import fsck as promises

        try:
            self.discarded.extend(promises.discard(resources, self.findings))
        except (RegistryError, OSError) as error:
            return error
        return None

    def to_json(self) -> dict[str, Any]:
        return {
            "clean": not self.broken,
            "checked": self.extent.to_json(),
            "findings": [finding.to_json() for finding in self.findings],
        }

    def show(self) -> None:
        for finding in self.findings:
            render.out(f"{finding.severity}: {finding.message}")
        for sha256 in self.discarded:
            render.out(f"discarded the damaged blob {sha256}: push its files again")
        verdict = f"{self.broken:,} error{'s' if self.broken > 1 else ''}" if self.broken else "clean"
        extent = self.extent
        if extent.steps:
            render.out(
                f"{verdict}: {', '.join(extent.contents)} "
                f"({render.size(extent.size_bytes)}{', all bytes read' if self.read_bytes else ', sizes only'})"
            )
        else:
            render.out(f"{verdict}, but nothing to check: {self.database_url} has no releases and no blobs")


@contextmanager
def own_resources() -> "Generator[Resources]":
    """The database and the store that this machine's settings name, for the length of a block."""
    from registry.transfer.resources import open_resources

    resources = open_resources(own_settings())
    try:
        yield resources
    finally:
        resources.close()
