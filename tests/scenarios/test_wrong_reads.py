"""A store that gives wrong bytes of a sound blob, once or for good."""

from collections.abc import Generator
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from composer.formats.checkpoints.hashing import hash_file
from registry.api.app import create_app
from registry.client.api import Api
from registry.client.inprocess import InProcessTransport
from registry.client.push import LocalFile, send
from registry.domain.jobs.queue import PAUSES
from registry.errors import Invalid, RegistryError, Unavailable
from registry.formats.manifest import ManifestFile
from registry.formats.references import Digest
from registry.transfer.resources import Resources
from registry.worker.runner import run_one
from tests.elapsed import let_elapse
from tests.scenarios.test_crashes import LATER, begin, resources_of, team, watched
from tests.scenarios.world import Cli, World


@dataclass
class Misread:
    """The real store, of which the next `wrong` reads each have one bit flipped, at byte `at`. `size_bytes` chooses
    the blobs, None for all."""

    store: Any
    wrong: int = 0
    at: int = 0
    size_bytes: int | None = None
    reads: list[str] = field(default_factory=list[str])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def open(self, sha256: Any, start: int = 0, length: int | None = None) -> Any:
        chosen = self.size_bytes is None or self.store.stat(sha256).size_bytes == self.size_bytes
        if not self.wrong or not chosen or start > self.at:
            return self.store.open(sha256, start, length)
        self.wrong -= 1
        self.reads.append(sha256)
        with self.store.open(sha256, start, length) as source:
            content = bytearray(source.read())
        content[self.at - start] ^= 1
        return BytesIO(content)


@pytest.fixture
def held(stocked_embedded: Cli, world: World) -> Generator[tuple[Cli, Resources, Misread]]:
    cli = team(stocked_embedded, world)
    with resources_of(cli.environment) as resources:
        store = Misread(resources.store)
        yield cli, replace(resources, store=store), store  # type: ignore[arg-type]


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


def pushed(resources: Resources, directory: Path) -> RegistryError | None:
    """Why a server with this store refuses the adapter."""
    api = Api("http://localhost", InProcessTransport(create_app(resources, on_demand=True)))
    manifest = [
        ManifestFile(path.name, path.stat().st_size, Digest(hash_file(path)))
        for path in sorted(directory.glob("adapter_*"))
    ]
    rows = [{"path": one.path, "size_bytes": one.size_bytes, "sha256": one.sha256} for one in manifest]
    try:
        send(api, "acme", [LocalFile(directory / one.path, one) for one in manifest], lambda _count: None)
        api.post("/v1/adapters/acme/new/releases", {"bump": "minor", "base": "tiny", "files": rows})
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
