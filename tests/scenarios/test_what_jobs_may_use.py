"""A job uses its worker without revealing its token, directories or environment."""

import json
import shutil
from collections.abc import Generator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from composer.errors import RefusedOutput
from registry.worker.runner import run_one
from registry.worker.steps import KINDS
from tests.composer.scorers import install_scorer
from tests.eventually import eventually
from tests.forked import start_command
from tests.scenarios.small_hub import SmallHub, small_hub
from tests.scenarios.test_crashes import begin, resources_of
from tests.scenarios.test_evaluations import write_suite
from tests.scenarios.test_hostile_hub import endless
from tests.scenarios.test_hub_import_and_export import online, stored
from tests.scenarios.test_worker_hosts import failing
from tests.scenarios.world import Cli, World, own_environment

SECRETS = {
    "HF_TOKEN": "hf_secret",
    "AWS_SECRET_ACCESS_KEY": "x",
    "ADAPTORY_TOKEN": "adp_secret",
    "DATABASE_URL": "postgresql://me:secret@db",
    "OPENAI_API_KEY": "sk",
}


@pytest.fixture
def hub() -> Generator[SmallHub]:
    with small_hub() as hub:
        yield hub


@pytest.mark.long
def test_a_job_sends_the_workers_hub_token_for_the_named_organisations_only(
    on_disk: Cli, hub: SmallHub, world: World, tmp_path: Path
) -> None:
    hub.put("Acme/private", stored(world.base))
    me = online(on_disk, tmp_path / "me").having(HF_ENDPOINT=hub.url, HF_TOKEN="hf_secret")  # noqa: S106
    me.ok("base", "add", "hf://Acme/private", "--name", "tiny")
    assert {token for _, _, token in hub.requests} == {"Bearer hf_secret"}, "the user's own wish"
    me.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny")
    me.ok("suite", "add", write_suite(tmp_path, "exact"))
    for named, sent in ((None, None), ("other", None), ("other,acme", "Bearer hf_secret")):
        shutil.rmtree(tmp_path / "me" / "hf")
        shutil.rmtree(
            tmp_path / "home" / "store" / "work", ignore_errors=True
        )  # results that were measured need no base
        hub.requests.clear()
        worker = me.having(ADAPTORY_HUB_TOKEN_ORGS=named) if named else me
        worker.ok("eval", "acme/sql:1.0.0", "--suite", "exact", "--queue")
        assert hub.downloads(), named
        assert {token for _, _, token in hub.requests} == {sent}


@pytest.mark.long
def test_without_the_token_the_job_says_which_setting_names_the_organisation(
    on_disk: Cli, hub: SmallHub, world: World, tmp_path: Path
) -> None:
    hub.put("Acme/private", stored(world.base))
    me = online(on_disk, tmp_path / "me").having(HF_ENDPOINT=hub.url)
    me.ok("base", "add", "hf://Acme/private", "--name", "tiny")
    me.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny")
    shutil.rmtree(tmp_path / "me" / "hf")
    hub.commits.clear()
    refused = me("compose", write_simple_recipe(tmp_path))
    assert (refused.code, "ADAPTORY_HUB_TOKEN_ORGS" in refused.err) == (3, True), refused.err


def write_simple_recipe(directory: Path) -> Path:
    path = directory / "simple.yaml"
    path.write_text("inputs: [acme/sql:1.0.0]\nmethod: stack\nmodel: acme/merged:1.0.0\n")
    return path


@pytest.mark.parametrize(
    "error",
    [
        OSError(5, "Input/output error", "/srv/secret/work/x.safetensors"),
        RuntimeError("cannot open '/srv/secret/work/x.safetensors' for file:///srv/secret/base"),
        RuntimeError(
            "failed:/srv/secret/x.safetensors, sqlite:////srv/secret/db, file:/srv/secret/a and //srv/secret/b"
        ),
        RefusedOutput(
            "busy", "It is at /srv/secret/out.", subject="/srv/secret/out", next_step="Look into /srv/secret/x."
        ),
    ],
)
def test_the_error_of_a_job_names_no_directory_of_its_worker(
    sql_and_support: Cli, tmp_path: Path, error: Exception
) -> None:
    cli = sql_and_support
    begin(cli, tmp_path)
    with resources_of(cli.environment) as resources:
        assert run_one(resources, failing("combine", error), "worker")
    shown = json.dumps(cli.json("jobs", 1))
    assert cli.json("jobs", 1)["error"]
    assert "secret" not in shown
    assert ("x.safetensors" in shown) == isinstance(error, RuntimeError), "the file may be named"


def test_a_directory_with_blanks_in_its_name_is_not_named_either(sql_and_support: Cli, tmp_path: Path) -> None:
    cli = sql_and_support
    begin(cli, tmp_path)
    with resources_of(cli.environment) as resources:
        settings = resources.settings.model_copy(update={"home": Path("/srv/Secret Support/my secret home")})
        subject = "/srv/our secret, old bases (2)/tiny"
        texts = f"{subject} differs from {settings.home_directory}/work/composition-1/x."
        error = RefusedOutput("busy", texts, subject=subject, next_step=f"Look into {subject}/config.json.")
        assert run_one(replace(resources, settings=settings), failing("combine", error), "worker")
    shown = cli.json("jobs", 1)["error"]
    assert (shown["subject"], shown["next"]) == ("…/tiny", "Look into …/tiny/config.json.")
    assert "ecret" not in json.dumps(cli.json("jobs", 1))


def test_a_base_that_is_not_here_is_named_without_its_directory(
    sql_and_support: Cli, world: World, tmp_path: Path
) -> None:
    cli = sql_and_support
    begin(cli, tmp_path)
    moved = world.base.rename(world.base.with_name("away"))
    try:
        with resources_of(cli.environment) as resources:
            assert run_one(resources, KINDS, "worker")
    finally:
        moved.rename(world.base)
    error: dict[str, Any] = cli.json("jobs", 1)["error"]
    assert error["code"] == "base_not_here"
    assert f"(file://…/{world.base.name})" in error["detail"]
    assert str(world.base.parent) not in json.dumps(cli.json("jobs", 1))


@pytest.mark.on("PostgreSQL")
def test_a_scorer_inherits_no_secret_of_its_worker(
    sql_and_support: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli, site, written = sql_and_support, tmp_path / "site", tmp_path / "environment"
    site.mkdir()
    install_scorer(site)
    monkeypatch.syspath_prepend(site)
    scorer = {"name": "obedient", "settings": {"marker": str(written), "does": "tells"}}
    asked: dict[str, Any] = {"generation": {"max_new_tokens": 2}, "scorer": scorer}
    cli.ok("suite", "add", write_suite(tmp_path, "written", task="generation", **asked))
    for name, text in {**SECRETS, "SCORER_KEY": "for it"}.items():
        monkeypatch.setenv(name, text)
    enabled = Cli(cli.environment | {"ADAPTORY_SCORERS": "obedient"}, cli.served_with)
    enabled.ok("eval", "acme/sql:1.0.0", "--suite", "written")
    names = set(written.read_text().splitlines())
    assert {"PATH", "PYTHONPATH", "SCORER_KEY"} <= names
    assert not names & SECRETS.keys()
    assert not any(name.startswith("ADAPTORY_") for name in names)


@pytest.mark.long
@pytest.mark.parametrize("ending", ["cancelled", "queued"])
def test_a_worker_that_fetches_a_base_from_a_slow_hub_heeds_a_cancellation_and_its_end(
    on_disk: Cli, hub: SmallHub, world: World, tmp_path: Path, ending: str
) -> None:
    hub.put("acme/base", stored(world.base))
    me = online(on_disk, tmp_path / "me").having(HF_ENDPOINT=hub.url)
    me.ok("base", "add", "hf://acme/base", "--name", "tiny")
    me.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny")
    me.ok("suite", "add", write_suite(tmp_path, "exact"))
    shutil.rmtree(tmp_path / "me" / "hf")
    asked: list[str] = []

    def instead(handler: BaseHTTPRequestHandler, path: str) -> bool:
        if "/resolve/" not in path or handler.command == "HEAD":
            return False
        asked.append(path)
        endless(handler, b" ", 0.1)
        return True

    hub.instead = instead
    me.ok("eval", "acme/sql:1.0.0", "--suite", "exact", "--queue", "--no-wait")
    environment = {**own_environment(me), "HF_HOME": str(tmp_path / "me" / "hf"), "HF_HUB_OFFLINE": "0"}
    worker = start_command(["worker"], environment, tmp_path / "worker.log")
    try:
        eventually(lambda: bool(asked), within_s=30)
        if ending == "cancelled":
            me.ok("cancel", 1)
        else:
            worker.terminate()
            worker.join(15)
            assert worker.exitcode is not None
        eventually(lambda: me.json("jobs", 1)["state"] == ending)
    finally:
        worker.kill()
        worker.join()
