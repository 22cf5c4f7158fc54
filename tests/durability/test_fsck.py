"""Reports of fsck: the extent of the check, an empty registry, and damage under all circumstances."""

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from composer.formats.checkpoints.hashing import hash_file
from registry.client.push import collect
from registry.client.selection import select_files
from registry.database.locks import lock_blobs_shared
from registry.database.tables import Channel
from registry.formats.references import Digest
from registry.storage.blobs import Reader
from registry.transfer import fsck
from tests.durability.conftest import opened
from tests.durability.small import write_adapter
from tests.scenarios import stored
from tests.scenarios.traces import home_of
from tests.scenarios.world import Cli

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def furnished(environ: dict[str, str], tmp_path: Path) -> Cli:
    """Two releases of three different files and one channel."""
    cli = Cli(environ)
    for seed, version in enumerate(("1.0.0", "1.1.0")):
        cli.ok("push", write_adapter(tmp_path / version, seed), f"acme/sql:{version}", "--base", "tiny")
    cli.ok("promote", "acme/sql:1.0.0", "--to", "prod")
    return cli


def test_a_clean_registry_is_called_clean_with_what_was_looked_at(furnished: Cli, tmp_path: Path) -> None:
    files = {
        file.manifest.sha256: file.manifest
        for name in ("1.0.0", "1.1.0")
        for file in collect(select_files(tmp_path / name))
    }
    size_bytes = sum(file.size_bytes for file in files.values())
    assert furnished.json("fsck")["checked"] == {
        "releases": 2,
        "revisions": 2,
        "channels": 1,
        "blobs": len(files),
        "size_bytes": size_bytes,
    }
    output = furnished.ok("fsck").out
    assert f"clean: 2 releases, 1 channel, {len(files)} blobs (" in output
    assert "sizes only" in output
    assert "all bytes read" in furnished.ok("fsck", "--full").out


def test_a_registry_with_nothing_in_it_is_not_called_clean_without_more(environ: dict[str, str]) -> None:
    """An operator who connected to the wrong database, or lost one, must see it."""
    output = Cli(environ).ok("fsck").out
    assert "nothing to check" in output
    assert environ.get("ADAPTORY_DATABASE_URL", environ["ADAPTORY_HOME"]).rpartition("/")[2] in output
    assert set(Cli(environ).json("fsck")["checked"].values()) == {0}


@pytest.mark.on("PostgreSQL")
def test_a_search_that_would_not_find_what_a_channel_gives_out_is_an_error(
    furnished: Cli, environ: dict[str, str]
) -> None:
    resources = opened(environ)
    with resources.write() as session:
        session.execute(update(Channel).values(served_id=2))
    resources.close()
    ran = furnished("fsck")
    assert (ran.code, "the release that acme/sql@prod serves" in ran.out) == (1, True), ran


@dataclass
class RestoredMeanwhile:
    """The real store, with a blob that is restored as soon as its damaged bytes have been read."""

    store: Any
    restore: Callable[[], None]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    @contextmanager
    def open(self, sha256: Digest) -> Generator[Reader]:
        with self.store.open(sha256) as damaged:
            yield damaged
        self.restore()


def test_what_is_restored_between_the_last_look_at_its_bytes_and_its_removal_stays(
    furnished: Cli, environ: dict[str, str], tmp_path: Path
) -> None:
    weights = tmp_path / "1.0.0" / WEIGHTS
    sha256 = hash_file(weights)
    stored.damage(furnished, sha256)

    def restore() -> None:
        time.sleep(1.1)  # S3 records the second in which a blob was written
        stored.overwrite(furnished, sha256, weights.read_bytes())

    held = opened(environ)
    findings = fsck.check(held, read_bytes=True)
    assert [finding.subject for finding in findings] == [sha256]
    assert list(fsck.discard(replace(held, store=RestoredMeanwhile(held.store, restore)), findings)) == []
    held.close()
    furnished.ok("fsck", "--full")
    assert furnished.json("audit", "--act", "blob:discard")["items"] == [], "the audit has nothing that was not done"


@dataclass
class DiesOnceDeleted:
    """The real store, whose process ends as soon as a blob is gone."""

    store: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def delete(self, sha256: Digest) -> None:
        self.store.delete(sha256)
        raise SystemExit


def test_no_blob_is_discarded_without_an_audit_row_wherever_it_ends(
    furnished: Cli, environ: dict[str, str], tmp_path: Path
) -> None:
    sha256 = hash_file(tmp_path / "1.0.0" / WEIGHTS)
    stored.damage(furnished, sha256)
    held = opened(environ)
    findings = fsck.check(held, read_bytes=True)
    with pytest.raises(SystemExit):
        list(fsck.discard(replace(held, store=DiesOnceDeleted(held.store)), findings))
    assert held.store.stat(Digest(sha256)) is None
    held.close()
    (row,) = furnished.json("audit", "--act", "blob:discard")["items"]
    assert (row["subject"], row["reason"]) == (sha256, "damaged")


@pytest.mark.long
def test_damage_is_reported_when_nothing_of_it_can_be_discarded(
    furnished: Cli, environ: dict[str, str], tmp_path: Path
) -> None:
    sha256 = hash_file(tmp_path / "1.0.0" / WEIGHTS)
    stored.damage(furnished, sha256)
    impatient = Cli(environ | {"ADAPTORY_DATABASE_TIMEOUT_S": "1"})
    held = opened(environ)
    with held.write() as session:
        lock_blobs_shared(session)  # and is in the way for longer than fsck waits
        ran = impatient("fsck", "--full", "--discard", "--json")
        shown = impatient("fsck", "--full", "--discard")
    held.close()
    assert (ran.code, ran.json["clean"], ran.json["discarded"]) == (7, False, [])
    assert ran.json["error"]["code"] == "database_unavailable"
    assert [(finding["code"], finding["subject"]) for finding in ran.json["findings"]] == [("blob_corrupt", sha256)]
    assert (shown.code, "discarded" in shown.out) == (7, False)
    assert f"{WEIGHTS} of acme/sql:1.0.0" in shown.out
    assert "The database cannot be used" in shown.err
    assert furnished.json("fsck")["clean"], "and nothing was discarded"


@pytest.mark.parametrize("pairing", ["SQLite and a directory"], indirect=True)
def test_what_was_discarded_is_reported_when_the_next_one_cannot_be(furnished: Cli, tmp_path: Path) -> None:
    """The other blob is a directory: a mistake during a restore."""
    first, other = sorted(hash_file(tmp_path / version / WEIGHTS) for version in ("1.0.0", "1.1.0"))
    stored.damage(furnished, first)
    stored.lose(furnished, other)
    (home_of(furnished) / "store" / "blobs" / "sha256" / other[:2] / other).mkdir()
    ran = furnished("fsck", "--full", "--discard", "--json")
    assert (ran.code, ran.json["discarded"], ran.json["error"]["code"]) == (7, [first], "disk_error")
    assert {finding["subject"] for finding in ran.json["findings"]} == {first, other}
    (row,) = furnished.json("audit", "--act", "blob:discard")["items"]
    assert row["subject"] == first
