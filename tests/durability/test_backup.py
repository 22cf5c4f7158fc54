"""Backups by other programs, taken during pushes and promotions: complete if the database is saved first. The commands
are those of docs/how-to/back-up.md, with Python instead of `sqlite3`, `cp` and `aws`."""

import re
import shutil
import sqlite3
import subprocess
import threading
import time
from collections.abc import Generator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from registry.client.api import Api
from registry.client.push import push
from registry.errors import RegistryError
from tests import services
from tests.durability.processes import CHANNEL, NAME, kill, serve, wait_for_port
from tests.durability.small import adapter_files
from tests.forked import start
from tests.s3_server import BUCKET
from tests.scenarios.world import Cli


@dataclass(frozen=True)
class Backup:
    """A backup of the registry in `environ`, below `directory`; restored into another home, database and store."""

    environ: Mapping[str, str]
    directory: Path

    @property
    def on_s3(self) -> bool:
        return "AWS_ACCESS_KEY_ID" in self.environ

    def save_database(self) -> None:
        self.directory.mkdir(exist_ok=True)
        if not self.on_s3:
            with closing(sqlite3.connect(Path(self.environ["ADAPTORY_HOME"]) / "registry.db")) as database:
                database.execute("VACUUM INTO ?", [str(self.directory / "registry.db")])
            return
        _postgres(
            "pg_dump", "--format=custom", "--file", self.directory / "dump", self.environ["ADAPTORY_DATABASE_URL"]
        )

    def save_blobs(self) -> None:
        if not self.on_s3:
            shutil.copytree(Path(self.environ["ADAPTORY_HOME"]) / "store" / "blobs", self.directory / "blobs")
            return
        _copy_objects(self.environ["ADAPTORY_STORAGE__PREFIX"], f"backup-{self.environ['ADAPTORY_STORAGE__PREFIX']}")

    def restore(self, home: Path) -> dict[str, str]:
        """Restores it; returns the environment of the new registry."""
        home.mkdir()
        if not self.on_s3:
            shutil.copy(self.directory / "registry.db", home / "registry.db")
            shutil.copytree(self.directory / "blobs", home / "store" / "blobs")
            return {**self.environ, "ADAPTORY_HOME": str(home)}
        url = services.new_database()
        _postgres("pg_restore", "--dbname", url, self.directory / "dump")
        prefix = self.environ["ADAPTORY_STORAGE__PREFIX"]
        _copy_objects(f"backup-{prefix}", f"restored-{prefix}")
        return {
            **self.environ,
            "ADAPTORY_HOME": str(home),
            "ADAPTORY_DATABASE_URL": url,
            "ADAPTORY_STORAGE__PREFIX": f"restored-{prefix}",
        }


def _postgres(program: str, *arguments: object) -> None:
    subprocess.run([f"{services.postgres_binaries()}/{program}", *map(str, arguments)], check=True)


def _copy_objects(source: str, target: str) -> None:
    """Copies blobs alone: unfinished uploads are sent again."""
    client = services.shared_s3().client()
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{source}blobs/"):
        for row in page.get("Contents", ()):
            key = row["Key"].removeprefix(source)
            client.copy_object(Bucket=BUCKET, Key=f"{target}{key}", CopySource={"Bucket": BUCKET, "Key": row["Key"]})


@contextmanager
def busy(environ: Mapping[str, str], directory: Path) -> Generator[list[str]]:
    """A client that pushes and promotes until the block ends; yields the versions pushed so far."""
    port, stop, pushed = services.free_port(), threading.Event(), list[str]()
    server = start(serve, environ, port)
    wait_for_port(port)
    failures: list[RegistryError] = []

    def work() -> None:
        api, number = Api(f"http://127.0.0.1:{port}"), 0
        while not stop.is_set():
            version = f"1.{number}.0"
            files = adapter_files(directory / version, number)
            try:
                push(api, files, NAME, "adapter", {"version": version, "base": "tiny"}, lambda _count: None)
                api.put(CHANNEL, {"version": version})
            except RegistryError as error:
                failures.append(error)
                return
            pushed.append(version)
            number += 1
        api.close()

    client = threading.Thread(target=work)
    client.start()
    _wait_for(pushed, 3)
    try:
        yield pushed
    finally:
        stop.set()
        client.join()
        kill(server)
    assert failures == [], "a backup must disturb nobody"


def _wait_for(pushed: list[str], count: int) -> None:
    deadline = time.monotonic() + 60
    while len(pushed) < count:
        assert time.monotonic() < deadline, pushed
        time.sleep(0.01)


def checked(environ: Mapping[str, str]) -> tuple[int, Any]:
    ran = Cli(dict(environ))("fsck", "--full", "--json")
    return ran.code, ran.json


@pytest.mark.long
def test_a_backup_of_a_busy_registry_database_first_is_restored_whole(environ: dict[str, str], tmp_path: Path) -> None:
    backup = Backup(environ, tmp_path / "backup")
    with busy(environ, tmp_path / "adapters") as pushed:
        backup.save_database()
        _wait_for(pushed, len(pushed) + 2)
        backup.save_blobs()
        _wait_for(pushed, len(pushed) + 1)
    restored = backup.restore(tmp_path / "restored")
    code, report = checked(restored)
    assert (code, report["clean"]) == (0, True), report
    assert {finding["code"] for finding in report["findings"]} == {"orphans"}, "blobs of what came after the dump"

    cli = Cli(restored)
    versions = [row["version"] for row in cli.json("list", "acme/sql")["items"]]
    assert 3 <= len(versions) < len(pushed)
    for version in (versions[0], versions[-1]):
        cli.ok("pull", f"acme/sql:{version}", "-o", tmp_path / "pulled" / version)
        pulled = (tmp_path / "pulled" / version / "adapter_model.safetensors").read_bytes()
        assert pulled == (tmp_path / "adapters" / version / "adapter_model.safetensors").read_bytes()
    history = cli.json("history", "acme/sql@prod")["items"]
    assert [move["to_version"] for move in history][-3:] == ["1.2.0", "1.1.0", "1.0.0"]
    lost = f"1.{len(versions)}.0"
    cli.ok("push", tmp_path / "adapters" / lost, f"acme/sql:{lost}", "--base", "tiny")
    cli.ok("promote", f"acme/sql:{lost}", "--to", "prod")
    cli.ok("rollback", "acme/sql@prod")
    assert checked(restored)[0] == 0


@pytest.mark.long
def test_a_collection_between_the_two_halves_of_a_backup_takes_nothing_that_a_release_needs(
    environ: dict[str, str], tmp_path: Path
) -> None:
    backup = Backup(environ, tmp_path / "backup")
    shortly = Cli(environ | {"ADAPTORY_UPLOAD_EXPIRES_S": "1"})
    with busy(shortly.environment, tmp_path / "adapters"):
        backup.save_database()
        time.sleep(1.1)
        shortly.ok("gc", "--grace-hours", "0")
        backup.save_blobs()
    code, report = checked(backup.restore(tmp_path / "restored"))
    assert (code, report["clean"]) == (0, True), report


def test_a_backup_in_the_wrong_order_is_found_out_by_fsck(environ: dict[str, str], tmp_path: Path) -> None:
    backup = Backup(environ, tmp_path / "backup")
    backup.directory.mkdir()
    with busy(environ, tmp_path / "adapters") as pushed:
        backup.save_blobs()
        _wait_for(pushed, len(pushed) + 2)
        backup.save_database()
    restored = backup.restore(tmp_path / "restored")
    code, report = checked(restored)
    assert (code, report["clean"]) == (1, False)
    missing = [finding for finding in report["findings"] if finding["code"] == "blob_missing"]
    named = re.search(r"acme/sql:1\.\d+\.0", missing[0]["message"])
    assert named, "it says which release is hit"
    refused = Cli(restored)("pull", named.group(), "-o", tmp_path / "pulled")
    assert refused.code == 7, refused.err
    assert not (tmp_path / "pulled").exists()


@pytest.mark.long
def test_a_damaged_copy_of_a_blob_is_found_out_by_fsck_and_never_delivered(
    environ: dict[str, str], tmp_path: Path
) -> None:
    backup = Backup(environ, tmp_path / "backup")
    with busy(environ, tmp_path / "adapters"):
        backup.save_database()
        backup.save_blobs()
    restored = backup.restore(tmp_path / "restored")
    files = Cli(restored).json("show", "acme/sql:1.0.0")["files"]
    sha256, size = next((row["sha256"], row["size_bytes"]) for row in files if row["path"].endswith(".safetensors"))
    key = f"blobs/sha256/{sha256[:2]}/{sha256}"
    if backup.on_s3:
        client = services.shared_s3().client()
        client.put_object(Bucket=BUCKET, Key=f"{restored['ADAPTORY_STORAGE__PREFIX']}{key}", Body=bytes(size))
    else:
        path = Path(restored["ADAPTORY_HOME"]) / "store" / key
        path.chmod(0o644)
        path.write_bytes(bytes(size))
    assert Cli(restored)("fsck").code == 0, "its size is right"
    code, report = checked(restored)
    (error,) = [finding for finding in report["findings"] if finding["severity"] == "error"]
    assert (code, error["code"], error["subject"]) == (1, "blob_corrupt", sha256)
    assert "adapter_model.safetensors of acme/sql:1.0.0" in error["message"]
    refused = Cli(restored)("pull", "acme/sql:1.0.0", "-o", tmp_path / "pulled")
    assert refused.code != 0
    assert "adapter_model.safetensors" in refused.err
    assert not (tmp_path / "pulled").exists()
