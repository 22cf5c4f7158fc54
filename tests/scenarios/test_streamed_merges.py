"""Compositions whose base is only in a bucket: merged from there into the store, and refused if the base differs."""

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save

from composer.formats.checkpoints.checkpoint import open_checkpoint
from composer.formats.checkpoints.hashing import hash_checkpoint
from composer.merge.plan import plan_merge
from composer.merge.run import run_merge
from registry.cli.releases.base import base_request
from registry.domain.access import namespaces, tokens
from registry.domain.access.audit import Actor
from registry.domain.access.roles import EVERYWHERE, Role
from registry.domain.access.tokens import NewToken
from registry.domain.jobs.queue import MAX_ATTEMPTS, PAUSES
from registry.environment.settings import Settings
from registry.errors import NotAllowed
from registry.transfer.bases import Bases
from registry.transfer.collect import collect
from registry.transfer.resources import Resources
from registry.worker import merging
from registry.worker.engine.opened import WorkerEngine
from registry.worker.engine.protocol import Needs
from registry.worker.engine.units import Count, Result, Task, Unit
from registry.worker.merging import SHARD
from registry.worker.runner import JobLost, run_one
from registry.worker.steps import KINDS
from tests.composer.small_model import save_llama
from tests.s3_server import BUCKET, S3Server
from tests.scenarios.test_crashes import LATER, Killed, resources_of
from tests.scenarios.test_evaluations import write_suite
from tests.scenarios.test_roles_of_a_composition import asking
from tests.scenarios.traces import api_of, home_of, traces
from tests.scenarios.world import Cli, World

NAMING = ("adaptory.json", "README.md")
"""Files that name the adapters: those of a registry by commit."""
RECIPE: dict[str, Any] = {
    "inputs": [{"adapter": "acme/sql:1.0.0", "weight": 0.5}, {"adapter": "acme/support:1.0.0", "weight": 0.5}],
    "method": "linear", "model": "acme/merged:1.0.0", "probe": 0, "gates": [],
}  # fmt: skip


@dataclass(frozen=True)
class Site:
    """A registry whose base is in a bucket, and nowhere else."""

    cli: Cli
    s3: S3Server
    prefix: str
    added: Mapping[str, Any]

    @property
    def location(self) -> str:
        return f"s3://{BUCKET}/{self.prefix}"

    def put(self, file: Path, content: bytes | None = None) -> None:
        body = file.read_bytes() if content is None else content
        self.s3.client().put_object(Bucket=BUCKET, Key=f"{self.prefix}/{file.name}", Body=body)

    def remove(self, file: Path) -> None:
        self.s3.client().delete_object(Bucket=BUCKET, Key=f"{self.prefix}/{file.name}")

    @property
    def job(self) -> dict[str, Any]:
        job = self.cli.json("jobs", 1)
        return {"state": job["state"], "code": (job["error"] or {}).get("code")}

    def begin(self, **changes: Any) -> int:
        with api_of(self.cli) as api:
            return api.post("/v1/compositions", {"recipe": RECIPE | changes, "plan": False})["id"]

    def weights_on_disk(self) -> list[str]:
        return [path.name for path in home_of(self.cli).rglob("model*.safetensors")]


@pytest.fixture
def site(embedded: Cli, world: World, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Site:
    """With its store in a directory, boto3's own settings name the bucket's service."""
    for name, value in {**s3.credentials, "AWS_ENDPOINT_URL": s3.endpoint}.items():
        monkeypatch.setenv(name, value)
    prefix = f"bases/{uuid.uuid4().hex}/tiny"
    site = Site(embedded, s3, prefix, {})
    for file in world.base.iterdir():
        site.put(file)
    added = embedded.json("base", "add", site.location, "--name", "tiny")
    for name in ("sql", "support"):
        embedded.ok("push", world.adapters[name], f"acme/{name}:1.0.0", "--base", "tiny")
    return Site(embedded, s3, prefix, added)


def left_on_disk(site: Site) -> set[str]:
    """The unfinished files, without the results of units that the store keeps for a week."""
    return {path for path in traces(site.cli).work if not path.endswith(".json")}


def merged_on_disk(world: World, out: Path) -> dict[str, bytes]:
    """The files that a merge on a disk makes, but for those that name adapters."""
    members = [(world.adapters[name], 0.5) for name in ("sql", "support")]
    run_merge(plan_merge(open_checkpoint(world.base), members, "linear"), out)
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name not in NAMING}


def pulled(site: Site, out: Path) -> dict[str, bytes]:
    site.cli.ok("pull", "acme/merged:1.0.0", "-o", out)
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name not in NAMING}


def test_a_base_in_a_bucket_is_hashed_and_merged_where_it_is(
    site: Site, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = (number**2 for number in count())
    monkeypatch.setattr(merging, "monotonic", lambda: next(times))
    assert site.added["digest"] == hash_checkpoint(open_checkpoint(world.base)).weights_digest
    assert site.added["locations"] == [site.location]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    done = site.cli.json("compose", recipe)
    assert done["merge"]["shards"] == len(list(world.base.glob("*.safetensors")))
    assert done["merge"]["verified_rows"] > 0
    assert done["merge"]["seconds"] == 1, "of the merge, not of the publication, which finds it made"
    assert pulled(site, tmp_path / "pulled") == merged_on_disk(world, tmp_path / "merged")
    assert left_on_disk(site) == set()
    assert set(site.weights_on_disk()) <= {"model.safetensors"}, "those that `pull` keeps"


@pytest.mark.long
def test_a_base_that_suites_load_is_downloaded_once(site: Site, world: World, tmp_path: Path) -> None:
    site.cli.ok("suite", "add", world.suites["sql"])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE | {"evaluate": ["sql-exact"], "gates": []}))
    site.cli.ok("compose", recipe)
    assert pulled(site, tmp_path / "pulled") == merged_on_disk(world, tmp_path / "merged")
    (kept,) = (home_of(site.cli) / "cache" / "bases").glob("*/*")
    assert {path.name for path in kept.iterdir()} == {path.name for path in world.base.iterdir()}
    changed = next(kept.glob("*.safetensors"))
    before = changed.stat().st_mtime_ns
    site.cli.ok("eval", "tiny", "--suite", "sql-exact", "--limit", "1")
    assert changed.stat().st_mtime_ns == before


@pytest.mark.long
def test_processes_that_need_a_base_at_once_wait_for_one_download(site: Site, world: World) -> None:
    """Like the runners of one node."""
    bases = Bases(Settings(home=home_of(site.cli)))
    with ThreadPoolExecutor(4) as pool:
        brought = [pool.submit(bases.find, [site.location], 10**9) for _ in range(4)]
        ((directory, reasons),) = {(path, tuple(why)) for path, why in (download.result() for download in brought)}
    assert directory is not None
    assert {path.name for path in directory.iterdir()} == {path.name for path in world.base.iterdir()}
    assert (list(directory.parent.iterdir()), reasons) == ([directory], ())


@pytest.mark.long
def test_weights_that_the_index_does_not_name_are_not_downloaded(site: Site, world: World) -> None:
    """For example a copy for other programs, which some models have beside their shards."""
    site.s3.client().put_object(Bucket=BUCKET, Key=f"{site.prefix}/consolidated.safetensors", Body=b"other" * 1000)
    directory, _ = Bases(Settings(home=home_of(site.cli))).find([site.location], 10**9)
    assert directory is not None
    assert {path.name for path in directory.iterdir()} == {path.name for path in world.base.iterdir()}


@pytest.mark.long
def test_a_download_stops_with_its_job_and_leaves_what_others_use(site: Site, world: World) -> None:
    settings = Settings(home=home_of(site.cli))
    user, bases = Bases(settings), Bases(settings)
    used, _ = user.find([site.location], 10**9)
    file = min(world.base.glob("*.safetensors"))
    site.put(file, file.read_bytes()[:-1] + b"x")

    left = iter([True] * 3)

    def lost() -> None:
        if not next(left, False):
            raise JobLost

    with pytest.raises(JobLost):
        bases.find([site.location], 10**9, lost)
    changed, _ = bases.find([site.location], 10**9)
    assert used is not None
    assert changed is not None
    assert used.is_dir(), "a job has it"
    user.release()
    site.put(file)
    again, _ = bases.find([site.location], 10**9)
    assert again == used
    bases.release()
    site.put(file, file.read_bytes()[:-1] + b"y")
    last, _ = bases.find([site.location], 10**9)
    assert last is not None
    assert list(last.parent.iterdir()) == [last]


CHANGES: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "bytes of a tensor": ("base_changed", lambda content: content[:-1] + bytes([content[-1] ^ 1])),
    "its size": ("bad_safetensors", lambda content: content[:-1]),
}


@pytest.mark.long
@pytest.mark.parametrize("change", CHANGES)
def test_a_base_that_is_another_one_by_now_is_refused_and_nothing_is_published(
    change: str, site: Site, world: World
) -> None:
    code, made = CHANGES[change]
    site.begin()
    file = max(world.base.glob("*.safetensors"))
    site.put(file, made(file.read_bytes()))
    before = traces(site.cli).releases
    with resources_of(site.cli.environment) as resources:
        assert run_one(resources, KINDS, "worker")
    assert site.job["code"] == code
    assert traces(site.cli).releases == before


@pytest.mark.long
def test_a_base_that_was_another_one_for_a_while_is_merged_once_it_is_back(
    site: Site, world: World, tmp_path: Path
) -> None:
    """Results made from the other one are not kept."""
    site.begin()
    file = max(world.base.glob("*.safetensors"))
    site.put(file, CHANGES["bytes of a tensor"][1](file.read_bytes()))
    with resources_of(site.cli.environment) as resources:
        assert run_one(resources, KINDS, "worker")
        site.put(file)
        site.begin()
        assert run_one(resources, KINDS, "worker")
    assert [site.cli.json("jobs", number)["state"] for number in (1, 2)] == ["refused", "done"]
    assert pulled(site, tmp_path / "pulled") == merged_on_disk(world, tmp_path / "merged")


@pytest.mark.long
def test_the_next_merge_has_the_texts_and_the_layout_that_the_base_has_then(site: Site, world: World) -> None:
    """The digest of a base names its weights alone."""
    site.begin()
    with resources_of(site.cli.environment) as resources:
        assert run_one(resources, KINDS, "worker")
        site.put(world.base / "generation_config.json", b'{"max_length": 7}')
        for path, content in in_one_file(world.base).items():
            site.put(world.base / path, content)
        for file in world.base.glob("model-*.safetensors"):
            site.remove(file)
        site.remove(world.base / "model.safetensors.index.json")
        site.begin(model="acme/merged:1.1.0")
        assert run_one(resources, KINDS, "worker")
    assert site.cli.json("jobs", 2)["error"] is None
    files = {row["path"] for row in site.cli.json("show", "acme/merged:1.1.0")["files"]}
    assert "generation_config.json" in files
    assert {path for path in files if path.endswith(".safetensors")} == {"model.safetensors"}


def in_one_file(base: Path) -> dict[str, bytes]:
    """The base's weights as one file."""
    tensors = {name: tensor for path in base.glob("*.safetensors") for name, tensor in load_file(path).items()}
    return {"model.safetensors": save(tensors)}


class Watched(WorkerEngine):
    """The engine, with what happens before the shards are begun, after each, and when one reports progress."""

    def __init__(self, resources: Resources) -> None:
        super().__init__(resources.settings, resources.store)
        self.before: Callable[[], None] = lambda: None
        self.after: Callable[[], None] = lambda: None
        self.within: Callable[[int], None] = lambda _done: None
        self.made = list[str]()
        self.written_bytes = 0

    def map(self, task: Task, units: Sequence[Unit], needs: Needs, check: Count) -> Iterator[tuple[Unit, Result]]:
        def counted(done: int) -> None:
            self.written_bytes += done
            self.within(done)
            check(done)

        if task.name != SHARD.name:
            yield from super().map(task, units, needs, check)
            return
        self.before()
        for unit, result in super().map(task, units, needs, counted):
            self.made.append(unit.name)
            yield unit, result
            self.after()


@pytest.mark.long
def test_shards_of_one_merge_are_not_made_of_files_that_are_laid_out_otherwise(site: Site, world: World) -> None:
    """As when two nodes have the same weights in other files: each shard alone would be right."""
    site.begin()
    first = min(world.base.glob("*.safetensors"))
    with resources_of(site.cli.environment) as resources:
        engine = Watched(resources)

        def elsewhere() -> None:
            site.put(first, save(dict(load_file(first)), {"format": "pt", "made": "elsewhere"}))
            engine.release()  # another process makes the shards

        engine.before = elsewhere
        with closing(engine):
            assert run_one(resources, KINDS, "worker", engine=engine)
    assert site.job == {"state": "refused", "code": "base_changed"}


@pytest.mark.long
def test_an_object_that_changes_during_the_merge_is_refused_and_nothing_is_published(site: Site, world: World) -> None:
    site.begin()
    last = min(world.base.glob("*.safetensors"))
    before = traces(site.cli).releases
    with resources_of(site.cli.environment) as resources:
        engine = Watched(resources)
        engine.after = lambda: site.put(last, last.read_bytes()[:-1] + b"x")
        with closing(engine):
            assert run_one(resources, KINDS, "worker", engine=engine)
    assert site.job == {"state": "failed", "code": "inputs_changed"}
    assert traces(site.cli).releases == before


@pytest.mark.long
def test_a_killed_merge_goes_on_with_its_finished_shards_and_leaves_what_a_sweep_removes(
    site: Site, world: World, tmp_path: Path
) -> None:
    site.begin()
    with resources_of(site.cli.environment) as resources:
        first = Watched(resources)

        def die(done: int) -> None:
            if done and len(first.made) == 2:
                raise Killed

        first.within = die
        with closing(first), pytest.raises(Killed):
            run_one(resources, KINDS, "first", engine=first)
    with resources_of(site.cli.environment, LATER) as resources:
        second = Watched(resources)
        with closing(second):
            assert run_one(resources, KINDS, "second", engine=second)
        resources.store.sweep(resources.clock() + LATER, ())
    assert site.job["state"] == "done"
    files = pulled(site, tmp_path / "pulled")
    assert files == merged_on_disk(world, tmp_path / "merged")
    left = {name for name in files if name.endswith(".safetensors")} - set(first.made)
    assert second.written_bytes == sum(len(files[name]) for name in left), "none was made twice"
    assert left_on_disk(site) == set()


@pytest.mark.long
def test_a_merge_that_fails_in_each_attempt_leaves_what_gc_removes(site: Site) -> None:
    site.begin()
    before = traces(site.cli)

    def fail(done: int) -> None:
        if done:
            raise OSError("as the disk of the work directory")

    for attempt in range(MAX_ATTEMPTS):
        with resources_of(site.cli.environment, 2 * PAUSES[-1] * attempt) as resources:
            engine = Watched(resources)
            engine.within = fail
            with closing(engine):
                assert run_one(resources, KINDS, "worker", engine=engine)
        state = "failed" if attempt == MAX_ATTEMPTS - 1 else "queued"
        assert site.job == {"state": state, "code": "disk_error"}
    with resources_of(site.cli.environment, 2 * PAUSES[-1] * MAX_ATTEMPTS) as resources:
        collect(resources, grace=timedelta(0))
    assert traces(site.cli).blobs == before.blobs
    assert left_on_disk(site) == set()


def test_only_an_admin_of_the_registry_adds_a_location_in_a_bucket(site: Site, tmp_path: Path) -> None:
    with resources_of(site.cli.environment) as resources:
        host = Actor("host", resources.clock(), {EVERYWHERE: Role.ADMIN}, mints=True)
        secrets: dict[str, str] = {}
        with resources.write() as session:
            for user, namespace, role in (("pia", "lab", Role.PUBLISHER), ("ada", EVERYWHERE, Role.ADMIN)):
                namespaces.set_member(session, host, namespace, user, role)
                _, secrets[user] = tokens.create(session, host, NewToken(user, "", {EVERYWHERE: Role.ADMIN}, None))
        checkpoint = open_checkpoint(save_llama(tmp_path / "other", seed=9))
        request = base_request(checkpoint, hash_checkpoint(checkpoint), "other", [], f"{site.location}-other")
        with asking(resources, secrets["pia"]) as api:
            with pytest.raises(NotAllowed) as refused:
                api.post("/v1/bases", request)
            assert refused.value.code == "role_missing"
            with pytest.raises(NotAllowed):
                api.post("/v1/bases", request | {"locations": ["file:///models/other"]})
            assert api.post("/v1/bases", request | {"locations": [f"hf://acme/other@{'a' * 40}"]})["locations"]
        with asking(resources, secrets["ada"]) as api:
            assert f"{site.location}-other" in api.post("/v1/bases", request)["locations"]


@pytest.mark.long
def test_only_what_lies_right_below_the_prefix_is_read(site: Site, world: World) -> None:
    for key in (f"{site.prefix}-secret/notes.txt", f"{site.prefix}/deeper/notes.txt", f"{site.prefix}/.env"):
        site.s3.client().put_object(Bucket=BUCKET, Key=key, Body=b"secret")
    recipe_id = site.begin()
    with resources_of(site.cli.environment) as resources:
        assert run_one(resources, KINDS, "worker")
    assert recipe_id
    assert site.job["state"] == "done"
    paths = {row["path"] for row in site.cli.json("show", "acme/merged:1.0.0")["files"]}
    assert paths == {path.name for path in world.base.iterdir()} | {"adaptory.json", "README.md"}


@pytest.mark.long
def test_a_copy_of_a_base_that_was_downloaded_wrongly_is_downloaded_again(site: Site, tmp_path: Path) -> None:
    for name in ("one", "other"):
        site.cli.ok("suite", "add", write_suite(tmp_path, name))
    site.cli.ok("eval", "acme/sql:1.0.0", "--suite", "one", "--queue")
    copy, *_ = sorted((home_of(site.cli) / "cache" / "bases").rglob("model-*.safetensors"))
    content = bytearray(right := copy.read_bytes())
    content[-1] ^= 1
    copy.write_bytes(content)
    site.cli.ok("eval", "acme/sql:1.0.0", "--suite", "other", "--queue")
    assert copy.read_bytes() == right
