"""A store that returns wrong bytes of an intact blob, once or permanently."""

import shutil
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx2
import pytest

from composer.formats.checkpoints.hashing import hash_file
from registry.api.app import create_app
from registry.client.api import Api
from registry.client.inprocess import InProcessTransport
from registry.client.push import PushedFile, send
from registry.domain.jobs.queue import PAUSES
from registry.errors import Invalid, RegistryError, Unavailable
from registry.formats.manifest import ManifestFile
from registry.formats.references import Digest
from registry.storage.archive import LocalArchive
from registry.transfer.backup import back_up
from registry.transfer.fsck import check
from registry.transfer.resources import Resources
from registry.worker.runner import run_one
from tests.elapsed import let_elapse
from tests.scenarios.test_crashes import LATER, begin, resources_of, watched
from tests.scenarios.test_evaluations import write_suite
from tests.scenarios.world import Cli, World, nothing


@dataclass
class Misread:
    """The real store, whose next `wrong` reads each have one bit flipped, at byte `at`, after `right` correct ones.
    `size_bytes` selects the blobs, None selects all."""

    store: Any
    wrong: int = 0
    right: int = 0
    at: int = 0
    size_bytes: int | None = None
    reads: list[str] = field(default_factory=list[str])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def open(self, sha256: Any, start: int = 0, length: int | None = None) -> Any:
        chosen = self.size_bytes is None or self.store.stat(sha256).size_bytes == self.size_bytes
        if not self.wrong or not chosen or start > self.at:
            return self.store.open(sha256, start, length)
        if self.right:
            self.right -= 1
            return self.store.open(sha256, start, length)
        self.wrong -= 1
        self.reads.append(sha256)
        with self.store.open(sha256, start, length) as source:
            content = bytearray(source.read())
        content[self.at - start] ^= 1
        return BytesIO(content)


@pytest.fixture
def held(sql_and_support: Cli) -> Generator[tuple[Cli, Resources, Misread]]:
    cli = sql_and_support
    with resources_of(cli.environment) as resources:
        store = Misread(resources.store)
        yield cli, replace(resources, store=store), store  # type: ignore[arg-type]


@pytest.mark.long
def test_one_wrong_read_does_not_disturb_a_job_and_two_postpone_it(
    held: tuple[Cli, Resources, Misread], tmp_path: Path
) -> None:
    cli, resources, store = held
    begin(cli, tmp_path)
    store.wrong = 2
    assert run_one(resources, watched([]), "first")
    job = cli.json("jobs", 1)
    assert (len(set(store.reads)), job["state"], job["error"]["code"]) == (1, "queued", "blob_corrupt")
    let_elapse(resources, PAUSES[0])
    store.wrong = 1
    assert run_one(resources, watched([]), "second")
    assert len(store.reads) == 3
    assert cli.json("jobs", 1)["state"] == "done"


def test_a_job_whose_blob_stays_wrong_ends_after_its_last_attempt(
    held: tuple[Cli, Resources, Misread], tmp_path: Path
) -> None:
    cli, resources, store = held
    begin(cli, tmp_path)
    store.wrong = 1_000
    for _ in range(3):
        assert run_one(resources, watched([]), "worker")
        let_elapse(resources, 3 * LATER)
    job = cli.json("jobs", 1)
    assert (job["state"], job["error"]["code"]) == ("failed", "blob_corrupt")


def pushed(resources: Resources, directory: Path, name: str = "new") -> RegistryError | None:
    """Why a server with this store refuses the adapter."""
    api = Api("http://localhost", InProcessTransport(create_app(resources, on_demand=True)))
    manifest = [
        ManifestFile(path.name, path.stat().st_size, Digest(hash_file(path)))
        for path in sorted(directory.glob("[aR]*"))
    ]
    rows = [{"path": file.path, "size_bytes": file.size_bytes, "sha256": file.sha256} for file in manifest]
    try:
        send(api, "acme", [PushedFile(directory / file.path, file) for file in manifest], lambda _count: None)
        api.post(f"/v1/adapters/acme/{name}/releases", {"bump": "minor", "base": "tiny", "files": rows})
    except RegistryError as error:
        return error
    finally:
        api.close()
    return None


@pytest.mark.parametrize(("name", "at"), [("adapter_model.safetensors", 9), ("adapter_config.json", 0)])
def test_a_push_whose_blob_is_read_wrongly_is_not_blamed_on_the_file(
    held: tuple[Cli, Resources, Misread], world: World, name: str, at: int
) -> None:
    _, resources, store = held
    adapter = world.adapters["terraform"]
    store.at, store.size_bytes, store.wrong = at, (adapter / name).stat().st_size, 1_000
    refused = pushed(resources, adapter)
    assert isinstance(refused, Unavailable), refused
    assert refused.code == "blob_corrupt"
    store.wrong = 1
    assert pushed(resources, adapter) is None
    assert not store.wrong


def test_a_file_that_is_wrong_itself_is_still_refused_as_such(
    held: tuple[Cli, Resources, Misread], world: World, tmp_path: Path
) -> None:
    _, resources, _ = held
    for path in world.adapters["terraform"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "adapter_model.safetensors").write_bytes(b"not a checkpoint at all")
    assert isinstance(pushed(resources, tmp_path), Invalid)


CARD = """---
model-index:
- name: sql
  results:
  - task: {type: text-generation}
    dataset: {name: exact, type: exact}
    metrics: [{type: accuracy, value: 0.75}]
---
What it is trained for
"""


def released(world: World, directory: Path) -> Path:
    """A copy of an adapter with a card that reports a score."""
    shutil.copytree(world.adapters["terraform"], directory)
    (directory / "README.md").write_text(CARD)
    return directory


def shown(resources: Resources, path: str) -> httpx2.Response:
    transport = InProcessTransport(create_app(resources))
    with httpx2.Client(base_url="http://localhost", transport=transport) as http:
        return http.get(path, headers={"Accept": "text/html"} if not path.startswith("/v1/") else {})


def test_a_score_that_a_card_reports_is_not_one_that_was_read_wrongly(
    held: tuple[Cli, Resources, Misread], world: World, tmp_path: Path
) -> None:
    cli, resources, store = held
    cli.ok("suite", "add", write_suite(tmp_path, "exact"))
    adapter = released(world, tmp_path / "adapter")
    store.size_bytes, store.at = len(CARD), CARD.index("0.75") + 3
    for reads in range(5):
        store.right, store.wrong = reads, 1
        assert pushed(resources, adapter, f"new-{reads}") is None
        store.right = store.wrong = 0
        scores = cli.json("show", f"acme/new-{reads}")["scores"]
        assert [score["value"] for score in scores] == [0.75], reads


def test_a_card_that_is_read_wrongly_once_is_not_shown_so_for_good(
    held: tuple[Cli, Resources, Misread], world: World, tmp_path: Path
) -> None:
    cli, resources, store = held
    cli.ok("push", released(world, tmp_path / "adapter"), "acme/carded:1.0.0", "--base", "tiny")
    store.size_bytes, store.at, store.wrong = len(CARD), CARD.index("What"), 1
    for _ in range(2):
        assert "What it is trained for" in shown(resources, "/acme/carded/1.0.0").text
    assert not store.wrong


def test_results_that_are_read_wrongly_are_read_again(held: tuple[Cli, Resources, Misread], tmp_path: Path) -> None:
    cli, resources, store = held
    cli.ok("suite", "add", write_suite(tmp_path, "exact"))
    cli.ok("eval", "acme/sql:1.0.0", "--suite", "exact")
    path = "/v1/adapters/acme/sql/releases/1.0.0/scores/exact/results"
    right = shown(resources, path)
    assert right.status_code == 200, right.text
    store.size_bytes, store.at, store.wrong = len(right.content), len(right.content) // 2, 1
    assert shown(resources, path).content == right.content
    assert not store.wrong


class Silent:
    """Ignores progress."""

    def __call__(self, count: int) -> None: ...
    def expect(self, total: int) -> None: ...


def test_a_backup_has_a_blob_that_was_read_wrongly_once(held: tuple[Cli, Resources, Misread], tmp_path: Path) -> None:
    _, resources, store = held
    store.wrong = 1
    archive = LocalArchive(tmp_path / "backup")
    saved = back_up(resources, archive, keep=None, read_bytes=True, progress=Silent())
    assert (saved.manifest.missing, store.wrong) == ({}, 0)


def test_a_check_of_all_contents_reports_no_blob_that_was_read_wrongly_once(
    held: tuple[Cli, Resources, Misread],
) -> None:
    _, resources, store = held
    store.wrong = 1
    findings = check(resources, read_bytes=True, progress=nothing)
    assert not [finding for finding in findings if finding.code == "blob_corrupt"]
    assert not store.wrong
