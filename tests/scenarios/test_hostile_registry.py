"""Answers of a registry are untrusted: they name no path on this machine, and only the promised files."""

import hashlib
import json
import shutil
import tracemalloc
from collections.abc import Callable, Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from registry.client.api import Api, read
from registry.client.cache import BlobCache
from registry.client.pull import cached, pull
from registry.errors import Invalid, Unavailable, Usage
from registry.formats.manifest import ManifestFile, canonical_manifest, commit_id
from registry.formats.references import Digest
from registry.wire.search import ResolvedRelease
from tests.scenarios.test_signatures import Keys
from tests.scenarios.world import Cli, nothing

CONTENT = b"#!/bin/sh\necho harm\n"
SIZE_BYTES = len(CONTENT)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
Json = dict[str, Any]


class HostileRegistry:
    """Answers every question for a release with `release`, and every one for a file with `CONTENT`."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.release: Json = {}
        self.body: bytes | None = None
        self.asked: list[str] = []


@pytest.fixture
def hostile() -> Generator[HostileRegistry]:
    with _listening() as registry:
        yield registry


@contextmanager
def _listening() -> Generator[HostileRegistry]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_arguments: object) -> None:
            """Quiet."""

        def do_GET(self) -> None:
            registry.asked.append(self.path)
            resolving = self.path.startswith("/v1/resolve")
            body = json.dumps({"release": registry.release, "warning": ""}).encode() if resolving else CONTENT
            body, resolving = (registry.body, True) if registry.body is not None else (body, resolving)
            self.send_response(200)
            self.send_header("Content-Type", "application/json" if resolving else "application/octet-stream")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    registry = HostileRegistry(f"http://127.0.0.1:{server.server_port}")
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield registry
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def cli(hostile: HostileRegistry, tmp_path: Path) -> Cli:
    return Cli({"ADAPTORY_HOME": str(tmp_path / "home"), "ADAPTORY_URL": hostile.url})


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A file of the user that no pull may touch."""
    file = tmp_path / "victim" / "authorized_keys"
    file.parent.mkdir()
    file.write_text("precious")
    return file


def row(path: str = "run.txt", sha256: str = SHA256, size_bytes: Any = SIZE_BYTES) -> Json:
    return {"path": path, "sha256": sha256, "size_bytes": size_bytes}


def release_of(*files: Json, **other: Any) -> Json:
    """A release whose commit fits its files, unless `other` sets another one."""
    rows = [ManifestFile(file["path"], file["size_bytes"], Digest(file["sha256"])) for file in files]
    try:
        commit = commit_id(canonical_manifest(rows))
    except Invalid:
        commit = "a" * 40
    return {
        "repository": "acme/sql",
        "kind": "adapter",
        "version": "1.0.0",
        "commit": commit,
        "base": {"digest": SHA256, "name": "tiny"},
        "yanked": False,
        "yank_reason": None,
        "deprecated": None,
        "base_deprecated": None,
        "size_bytes": SIZE_BYTES,
        "files": list(files),
    } | other


def resolved(hostile: HostileRegistry) -> ResolvedRelease:
    return read(ResolvedRelease, "/v1/resolve", hostile.release)


def tree(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_an_honest_answer_is_pulled(hostile: HostileRegistry, cli: Cli, tmp_path: Path) -> None:
    """Otherwise the refusals below would prove nothing."""
    hostile.release = release_of(row())
    cli.ok("pull", "acme/sql:1.0.0", "-o", tmp_path / "out")
    assert tree(tmp_path / "out") == {"run.txt": CONTENT}


LIES: dict[str, tuple[str, Callable[[Path], Json]]] = {
    "a digest is a path": ("bad_answer", lambda victim: release_of(row(sha256=str(victim)))),
    "a digest climbs": ("bad_answer", lambda _: release_of(row(sha256="../../victim/authorized_keys"))),
    "a digest is a number": ("bad_answer", lambda _: release_of(row(sha256="0")) | {"files": [row() | {"sha256": 7}]}),
    "a commit is a path": (
        "commit_differs",
        lambda victim: release_of(row(), commit="abcdefabcdef" + "/.." * 30 + str(victim.parent)),
    ),
    "a commit is another's": ("commit_differs", lambda _: release_of(row(), commit="b" * 40)),
    "a repository is a path": ("bad_answer", lambda _: release_of(row(), repository="../../victim")),
    "a repository climbs": ("bad_answer", lambda _: release_of(row(), repository="../victim")),
    "a version is a path": ("bad_answer", lambda _: release_of(row(), version="../../../v1/other")),
    "a file climbs": ("bad_answer", lambda _: release_of(row("../../victim/authorized_keys"))),
    "a file is absolute": ("bad_answer", lambda victim: release_of(row(str(victim)))),
    "a file hides its ending": ("bad_answer", lambda _: release_of(row("\u202egpj.x"))),
    "a file is a directory": ("bad_answer", lambda _: release_of(row("x"), row("x/y"))),
    "two files are one": ("bad_answer", lambda _: release_of(row("x"), row("X"))),
    "a size is negative": ("bad_answer", lambda _: release_of(row(size_bytes=-1))),
    "a size is a fraction": ("bad_answer", lambda _: release_of(row(size_bytes=1.5))),
    "a size has no end": ("bad_answer", lambda _: release_of(row(size_bytes=10**400))),
    "there are no files": ("bad_answer", lambda _: release_of()),
    "there is no commit": (
        "bad_answer",
        lambda _: {name: value for name, value in release_of(row()).items() if name != "commit"},
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_an_answer_that_does_not_hold_together_is_refused_before_anything_is_written(
    hostile: HostileRegistry, tmp_path: Path, victim: Path, lie: str
) -> None:
    code, answer = LIES[lie]
    hostile.release = answer(victim)
    before, api = tree(tmp_path), Api(hostile.url)
    for fetch in (
        lambda: pull(
            api, resolved(hostile), tmp_path / "new" / "out", nothing, BlobCache(tmp_path / "cache" / "blobs")
        ),
        lambda: cached(api, resolved(hostile), tmp_path / "cache", nothing),
    ):
        with pytest.raises(Invalid, match="answer cannot be trusted") as raised:
            fetch()
        assert (raised.value.code, "ADAPTORY_URL" in raised.value.next_step) == (code, True)
    api.close()
    assert tree(tmp_path) == before
    assert not (tmp_path / "new").exists()
    assert hostile.asked == []


@pytest.mark.parametrize("path", [".git/config", "a/.envrc", "GIT~1/config"])
def test_a_hidden_file_is_not_written_even_if_a_registry_releases_it(
    hostile: HostileRegistry, tmp_path: Path, path: str
) -> None:
    hostile.release, api = release_of(row(path)), Api(hostile.url)
    cache = tmp_path / "cache"
    for fetch in (
        lambda: pull(api, resolved(hostile), tmp_path / "out", nothing, BlobCache(cache / "blobs")),
        lambda: cached(api, resolved(hostile), cache, nothing),
    ):
        with pytest.raises(Invalid, match=f"'{path}' is hidden"):
            fetch()
    api.close()
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("lie", ["a digest is a path", "a commit is a path", "a repository is a path", "a file climbs"])
def test_the_command_line_says_that_the_registry_lies(
    hostile: HostileRegistry, cli: Cli, tmp_path: Path, victim: Path, lie: str
) -> None:
    hostile.release = LIES[lie][1](victim)
    for ran in (cli("pull", "acme/sql:1.0.0", "-o", tmp_path / "out"), cli("inspect", "acme/sql:1.0.0")):
        assert (ran.code, "answer cannot be trusted" in ran.err) == (6, True), ran.err
        assert "Traceback" not in ran.err
    assert tree(victim.parent) == {"authorized_keys": b"precious"}
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("asked", ["acme/sql:1.0.1", "acme/sql:^2", "acme/other", "acme/sql#abcdef0"])
def test_another_release_than_the_one_asked_for_is_neither_pulled_nor_signed(
    hostile: HostileRegistry, cli: Cli, tmp_path: Path, asked: str
) -> None:
    """A client that signs a registry's answers must not be made to sign something else."""
    hostile.release, keys = release_of(row()), Keys(tmp_path, "team")
    for words in (("pull", asked, "-o", tmp_path / "out"), ("sign", asked, "--key", keys.private)):
        ran = cli(*words)
        assert (ran.code, f"answered {asked} with acme/sql:1.0.0" in ran.err) == (6, True), ran.err
    assert all(path.startswith("/v1/resolve") for path in hostile.asked), "nothing was fetched or sent"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changed", [{"base": "tiny"}, {"base": {}}, {"files": {"a": 1}}, {"files": [7]}])
def test_an_answer_of_another_form_is_not_signed(
    hostile: HostileRegistry, cli: Cli, tmp_path: Path, changed: Json
) -> None:
    hostile.release = release_of(row()) | changed
    ran = cli("sign", "acme/sql:1.0.0", "--key", Keys(tmp_path, "team").private)
    assert (ran.code, "answer cannot be trusted" in ran.err, "Traceback" in ran.err) == (6, True, False), ran.err


@pytest.mark.parametrize(
    "words",
    ["list", "show acme/sql:1.0.0", "pull acme/sql:1.0.0", "diff acme/sql:1.0.0 acme/sql:1.1.0", "base show tiny",
     "search", "policy show acme/sql@prod", "whoami", "jobs", "log acme/sql", "suite list", "token list"],
)  # fmt: skip
def test_an_answer_without_what_a_command_reads_is_refused_with_a_code(
    hostile: HostileRegistry, cli: Cli, words: str
) -> None:
    for body in (b"{}", b"[]", b"null", b"<html>", b"\xff", b'{"items": [{}]}', b"[" * 100_000):
        hostile.body = body
        ran = cli(*words.split())
        assert (ran.code, "Traceback" in ran.err) == (6, False), (body[:20], ran.err)


def test_bytes_that_are_not_the_promised_never_appear(hostile: HostileRegistry, cli: Cli, tmp_path: Path) -> None:
    hostile.release = release_of(row(sha256="0" * 64))
    ran = cli("pull", "acme/sql:1.0.0", "-o", tmp_path / "out")
    assert (ran.code, "was damaged" in ran.err) == (7, True), ran.err
    assert not (tmp_path / "out").exists()
    assert tree(tmp_path / "home") == {}


def test_a_release_larger_than_the_disk_is_refused_before_it_takes_space_or_memory(
    hostile: HostileRegistry, tmp_path: Path
) -> None:
    hostile.release = release_of(row("small.txt"), row("vast.txt", "1" * 64, 1 << 60))
    api = Api(hostile.url)
    tracemalloc.start()
    try:
        with pytest.raises(Unavailable, match="disk is full") as raised:
            pull(api, resolved(hostile), tmp_path / "out", nothing, BlobCache(tmp_path / "blobs"))
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
        api.close()
    assert (raised.value.code, raised.value.subject) == ("disk_full", "acme/sql:1.0.0")
    assert raised.value.next_step
    assert tree(tmp_path) == {}
    assert hostile.asked == []


def test_many_files_that_fit_alone_but_not_together_are_refused(hostile: HostileRegistry, tmp_path: Path) -> None:
    share = shutil.disk_usage(tmp_path).free // 3
    hostile.release = release_of(*[row(f"{number}.txt", str(number) * 64, share) for number in range(4)])
    api = Api(hostile.url)
    with pytest.raises(Unavailable) as raised:
        pull(api, resolved(hostile), tmp_path / "out", nothing)
    api.close()
    assert raised.value.code == "disk_full"
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("name", ["", ".", "../victim/authorized_keys", "A" * 64, "0" * 63, f"{'0' * 64}\n"])
def test_a_cache_has_entries_for_digests_alone(tmp_path: Path, victim: Path, name: str) -> None:
    cache = BlobCache(tmp_path / "blobs")
    cache.directory.mkdir()
    source = tmp_path / "source"
    source.write_bytes(CONTENT)
    for call in (lambda: cache.take(name, tmp_path / "target"), lambda: cache.keep(name, source)):
        with pytest.raises(Usage):
            call()
    with pytest.raises(Usage):
        cache.take(str(victim), tmp_path / "target")
    assert tree(tmp_path) == {"victim/authorized_keys": b"precious", "source": CONTENT}
    assert source.stat().st_mode & 0o200, "nor was it made read-only"
