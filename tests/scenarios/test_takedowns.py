"""Leaked files are removed for good and leave a tombstone; a namespace's holdings and their retention are bounded."""

import hashlib
import shutil
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import httpx2
import pytest

from registry.domain.access.audit import operator_actor
from registry.domain.catalog import releases
from registry.domain.catalog.commits import EMPTY
from registry.domain.channels import withdrawals
from registry.formats.references import RepositoryName, Version
from registry.transfer.collect import collect, remove_marked
from registry.transfer.fsck import check
from registry.worker.runner import run_one
from registry.worker.steps import KINDS
from tests.scenarios.test_push_again import beside
from tests.scenarios.traces import api_of, opened
from tests.scenarios.world import Cli, World

WEIGHTS = "adapter_model.safetensors"
NONE = timedelta(0)


@pytest.fixture
def adapter(world: World, tmp_path: Path) -> Path:
    directory = shutil.copytree(world.adapters["sql"], tmp_path / "adapter")
    (directory / "data.txt").write_text("the customers' names")
    return directory


def push(cli: Cli, adapter: Path, target: str, *more: object) -> None:
    cli.ok("push", adapter, target, "--base", "tiny", "--include", "data.txt", *more)


def blobs(cli: Cli) -> set[str]:
    held = opened(beside(cli))
    stored = {stat.sha256 for stat in held.store.iterate()}
    held.close()
    return stored


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_takedown_removes_the_bytes_for_good_and_leaves_a_tombstone(
    stocked: Cli, adapter: Path, tmp_path: Path
) -> None:
    (adapter / "README.md").write_text("# Their names\n")
    push(stocked, adapter, "acme/sql:1.0.0", "--notes", "names of customers inside", "--channel", "prod")
    push(stocked, adapter, "acme/sql:1.0.1")
    leaked, weights = digest(adapter / "data.txt"), digest(adapter / WEIGHTS)
    (adapter / "data.txt").write_text("nothing")
    (adapter / "README.md").unlink()
    push(stocked, adapter, "acme/sql:1.1.0")
    taken = stocked.json("takedown", "acme/sql:1.0.0", "--reason", "customer data")
    assert taken["releases"] == ["acme/sql:1.0.0", "acme/sql:1.0.1"], "both have the files"
    assert taken["kept_files"] == {"acme/sql:1.1.0": ["adapter_config.json", WEIGHTS]}
    assert (taken["named_by"], taken["barred"]) == (["acme/sql:1.1.0"], []), "its weights are still published"
    assert (taken["blobs"], leaked in blobs(stocked), weights in blobs(stocked)) == (2, False, True)
    gone = stocked("pull", "acme/sql:1.0.0", "-o", tmp_path / "out")
    assert (gone.code, (tmp_path / "out").exists()) == (3, False)
    assert "was taken down on" in gone.err
    assert "customer data" in gone.err
    with api_of(stocked) as api:
        stone = api.get("/v1/adapters/acme/sql/releases/1.0.0")
        channel = api.get("/v1/adapters/acme/sql/channels/prod")
    assert (stone["taken_down"]["reason"], stone["notes"], stone["yanked"]) == ("customer data", "", True)
    assert channel["version"] is None
    assert "taken_down" in stocked("unyank", "acme/sql:1.0.0", "--reason", "mistake", "--json").out
    assert stocked("search", "customers", "--include-yanked", "--json").json["items"] == []
    stocked.ok("pull", "acme/sql:1.1.0", "-o", tmp_path / "out")
    assert beside(stocked).json("fsck", "--full")["clean"]
    acts = [(row["subject"], row["reason"]) for row in stocked.json("audit", "--act", "release:takedown")["items"]]
    assert acts == [("acme/sql:1.0.1", "customer data"), ("acme/sql:1.0.0", "customer data")]
    again = stocked.json("takedown", "acme/sql:1.1.0", "--reason", "and the rest")
    assert (again["blobs"] > 0, blobs(stocked)) == (True, set())
    if (url := stocked.environment.get("ADAPTORY_URL")) is not None:
        page = httpx2.get(f"{url}/acme/sql/1.0.0")
        assert (page.status_code, "customer data" in page.text, "Their names" in page.text) == (200, True, False)
        page = httpx2.get(f"{url}/acme/sql/1.0.0/yank", headers={"Accept": "text/html"})
        assert (page.status_code, "nothing to undo" in page.text, 'name="undo"' in page.text) == (200, True, False)
        # A client of a hub starts over.
        planned = {"files": [{"path": "README.md", "size": 3, "sample": "eA=="}]}
        answer = httpx2.post(f"{url}/api/models/acme/sql/preupload/main", json=planned)
        assert (answer.status_code, answer.headers["X-Repo-Commit"]) == (200, EMPTY)


def test_files_that_were_taken_down_are_not_published_again_nor_are_their_weights_beside_others(
    stocked_embedded: Cli, adapter: Path, world: World
) -> None:
    push(stocked_embedded, adapter, "acme/sql:1.0.0")
    done = stocked_embedded.ok("takedown", "acme/sql:1.0.0", "--reason", "customer data")
    assert f"{WEIGHTS}: these weights cannot be published here again" in done.out
    for target in ("acme/sql:1.0.1", "acme/copy:1.0.0"):
        refused = stocked_embedded("push", adapter, target, "--base", "tiny", "--include", "data.txt")
        assert refused.code == 1
        assert "which was taken down: customer data" in refused.err
    (adapter / "README.md").write_text("# Nothing happened\n")
    refused = stocked_embedded("push", adapter, "acme/sql:1.0.1", "--base", "tiny")
    assert (refused.code, f"{WEIGHTS} has the weights of acme/sql#" in refused.err) == (1, True)
    shutil.copy(adapter / WEIGHTS, adapter / "notes.txt")
    shutil.copy(world.adapters["other-sql"] / WEIGHTS, adapter / WEIGHTS)
    refused = stocked_embedded("push", adapter, "acme/sql:1.0.1", "--base", "tiny", "--include", "notes.txt")
    assert (refused.code, "notes.txt has the weights of acme/sql#" in refused.err) == (1, True)
    push(stocked_embedded, adapter, "acme/sql:1.0.1")  # the same config, and even the same data


def test_weights_stay_if_they_were_published_without_the_file_that_has_to_go(
    stocked_embedded: Cli, adapter: Path
) -> None:
    push(stocked_embedded, adapter, "acme/sql:1.0.0")
    stocked_embedded.ok("push", adapter, "acme/sql:1.0.1", "--base", "tiny")
    done = stocked_embedded.ok("takedown", "acme/sql:1.0.0", "--reason", "customer data")
    assert f"acme/sql:1.0.1 still has README.md, adapter_config.json, {WEIGHTS}." in done.err
    (adapter / "README.md").write_text("# Without names\n")
    stocked_embedded.ok("push", adapter, "acme/sql:1.0.2", "--base", "tiny")
    for version in ("1.0.1", "1.0.2"):
        stocked_embedded.ok("takedown", f"acme/sql:{version}", "--reason", "trained on customer data")
    (adapter / "README.md").write_text("# Again\n")
    refused = stocked_embedded("push", adapter, "acme/sql:1.0.3", "--base", "tiny")
    assert f"{WEIGHTS} has the weights of" in refused.err


@pytest.mark.on("PostgreSQL")
def test_the_bytes_of_a_takedown_go_even_if_it_dies_before_it_removes_them(
    stocked_embedded: Cli, adapter: Path
) -> None:
    push(stocked_embedded, adapter, "acme/sql:1.0.0")
    held = opened(stocked_embedded)
    with held.write() as session:
        release = releases.find(session, RepositoryName("acme", "sql"), Version(1, 0, 0))
        withdrawals.take_down(session, operator_actor("mia", held.clock()), release, "customer data")
    assert len(list(held.store.iterate())) > 0
    assert collect(held, grace=timedelta(days=1)).blobs > 0, "younger than the grace of what is only unused"
    assert list(held.store.iterate()) == []
    assert not [finding for finding in check(held) if finding.severity == "error"]
    assert remove_marked(held)
    held.close()


@pytest.mark.long
def test_retention_takes_down_old_yanked_releases_and_pre_releases_that_nothing_serves(
    stocked_embedded: Cli, adapter: Path
) -> None:
    cli = stocked_embedded
    for version in ("1.0.0-rc.1", "1.0.0-rc.2", "1.0.0", "1.1.0"):
        (adapter / "data.txt").write_text(version)
        push(cli, adapter, f"acme/sql:{version}")
    cli.ok("promote", "acme/sql:1.0.0-rc.2", "--to", "canary")
    cli.ok("yank", "acme/sql:1.0.0", "--reason", "wrong")
    cli.ok("namespace", "retention", "acme", "--yanked", 30, "--prereleases", 90)
    held = opened(cli)

    def later(days: int) -> int:
        much_later = replace(held, clock=lambda: release_time + timedelta(days=days))
        counted = collect(much_later, grace=NONE, dry_run=True).releases
        assert collect(much_later, grace=NONE).releases == counted
        return counted

    release_time = held.clock()
    assert [later(days) for days in (29, 31, 89, 91, 1000)] == [0, 1, 0, 1, 0]
    assert not [finding for finding in check(held, read_bytes=True) if finding.severity == "error"]
    held.close()
    with api_of(cli) as api:
        down = {row["version"]: row["taken_down"] for row in api.pages("/v1/adapters/acme/sql/releases")}
    assert {version for version, stone in down.items() if stone} == {"1.0.0-rc.1", "1.0.0"}
    assert down["1.0.0"]["reason"] == "the namespace keeps yanked releases for 30 days"
    (adapter / "data.txt").write_text("1.0.0-rc.1")
    push(cli, adapter, "acme/sql:1.2.0")  # files removed only for their age may come back


@pytest.mark.on("SQLite")
def test_a_namespace_holds_no_more_than_its_quota(stocked: Cli, adapter: Path) -> None:
    push(stocked, adapter, "acme/sql:1.0.0")
    used = stocked.json("namespace", "usage", "acme")
    size = sum(path.stat().st_size for path in adapter.iterdir() if path.name != "README.md")
    assert (used["releases"], used["max_bytes"], used["size_bytes"] >= size) == (1, 2**40, True), "of a new namespace"
    stocked.ok("namespace", "quota", "acme", "--bytes", used["size_bytes"] + 10, "--releases", 3)
    (adapter / "data.txt").write_text("12345678901")
    refused = stocked("push", adapter, "acme/sql:1.1.0", "--base", "tiny", "--include", "data.txt")
    assert refused.code == 1
    assert "11 more do not fit" in refused.err
    (adapter / "data.txt").write_text("1234567890")
    push(stocked, adapter, "acme/sql:1.1.0")
    assert stocked.json("namespace", "usage", "acme")["size_bytes"] == used["size_bytes"] + 10
    (adapter / "data.txt").unlink()
    stocked.ok("push", adapter, "acme/sql:1.2.0", "--base", "tiny")
    (adapter / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text() + " ")
    refused = stocked("push", adapter, "acme/sql:1.3.0", "--base", "tiny")
    assert refused.code == 1
    stocked.ok("namespace", "quota", "acme", "--releases", 3)
    assert "may have 3 releases and has 3" in stocked("push", adapter, "acme/sql:1.3.0", "--base", "tiny").err
    stocked.ok("takedown", "acme/sql:1.0.0", "--reason", "not needed")
    stocked.ok("push", adapter, "acme/sql:1.3.0", "--base", "tiny")


@pytest.mark.parametrize(
    ("command", "limit", "none"), [("quota", "bytes", "unlimited"), ("retention", "yanked", "keep-all")]
)
def test_limits_are_removed_only_on_request(stocked: Cli, command: str, limit: str, none: str) -> None:
    stocked.ok("namespace", "set", "acme")
    stocked.ok("namespace", command, "acme", f"--{limit}", 30)
    for options in ([], [f"--{limit}", 30, f"--{none}"]):
        refused = stocked("namespace", command, "acme", *options)
        assert refused.code == 2
        assert f"--{none} alone" in refused.err
    assert None in stocked.json("namespace", command, "acme", f"--{none}").values()


def test_an_evaluation_of_what_was_taken_down_meanwhile_says_so(team: Cli) -> None:
    waiting = team.json("eval", "acme/sql", "--suite", "sql-exact", "--queue", "--no-wait")
    team.ok("takedown", "acme/sql:1.0.0", "--reason", "private data")
    with closing(opened(team)) as resources:
        assert run_one(resources, KINDS, "worker")
    ended = team.json("jobs", waiting["job"])
    assert (ended["state"], ended["error"]["code"]) == ("failed", "taken_down")
    assert "acme/sql:1.0.0 was taken down on" in ended["error"]["detail"]
