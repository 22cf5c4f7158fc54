"""`adaptory doctor` names the problems of an installation, and collects information for a bug report."""

import json
import shutil
import zipfile
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from registry.database.engine import Database
from registry.database.tables import Blob, Job
from tests.scenarios.test_push_again import beside
from tests.scenarios.traces import opened
from tests.scenarios.world import Cli, Ran, World


def checks(ran: Ran) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in ran.json["checks"]}


def states(ran: Ran) -> dict[str, str]:
    return {name: check["state"] for name, check in checks(ran).items()}


@pytest.mark.on("SQLite")
def test_an_installation_that_works_passes_every_check(stocked: Cli, world: World) -> None:
    stocked.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny")
    ran = beside(stocked)("doctor", "--json")
    seen = states(ran)
    assert (ran.code, ran.json["healthy"], set(seen.values())) == (0, True, {"ok"}), ran.out
    assert {"home directory", "packages", "database", "store", "contents", "access", "workers", "bases"} <= set(seen)
    assert "1 release, " in checks(ran)["contents"]["detail"]
    if "ADAPTORY_URL" in stocked.environment:
        ran = stocked("doctor", "--json")
        assert (ran.code, states(ran)) == (0, {"server": "ok", "token": "ok"})


def test_what_is_wrong_is_said_with_what_to_do(stocked_embedded: Cli, world: World, tmp_path: Path) -> None:
    cli = stocked_embedded
    cli.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny")
    held = opened(cli)
    long_ago = held.clock() - timedelta(days=2)
    with held.write() as session:
        session.execute(update(Blob).values(removing_at=long_ago, removing_by="dead"))
        session.add(
            Job(kind="compose", namespace="acme", state="queued", steps=[], created_at=long_ago, created_by="mia")
        )
    held.close()
    policy = tmp_path / "policy.yaml"
    for channel, more in (("prod", ", force: releaser"), ("edge", ", force: admin"), ("next", "")):
        policy.write_text(f"{{version: 1, approval: {{}}{more}}}")
        cli.ok("policy", "set", f"acme/sql@{channel}", policy)
    shutil.move(world.base, world.base.with_name("elsewhere"))
    try:
        ran = cli("doctor", "--json")
    finally:
        shutil.move(world.base.with_name("elsewhere"), world.base)
    seen = checks(ran)
    assert (ran.code, ran.json["healthy"]) == (1, False)
    wrong = {name: check["state"] for name, check in seen.items() if check["state"] != "ok"}
    assert wrong == {
        "contents": "error", "policies": "warning", "workers": "warning", "gc": "warning", "bases": "warning"
    }  # fmt: skip
    assert seen["policies"]["detail"] == "1 policy requires an approval that a releaser can bypass: acme/sql@prod."
    assert all(seen[name]["next_step"] for name in wrong)
    assert "blob_leaving" in seen["contents"]["detail"]
    assert "the oldest for 2,880 minutes" in seen["workers"]["detail"]
    assert "contents" not in checks(cli("doctor", "--no-contents", "--json"))


@pytest.mark.parametrize(
    ("setting", "value", "failed"),
    [
        ("DATABASE_URL", "postgresql://nobody@127.0.0.1:9/none", "database"),
        ("STORAGE__DIRECTORY", "/proc/store", "blob directory"),
        ("ACCESS", "tokens", "access"),
    ],
)
def test_a_part_that_cannot_be_used_is_named(on_disk: Cli, setting: str, value: str, failed: str) -> None:
    broken = replace(on_disk, environment=on_disk.environment | {f"ADAPTORY_{setting}": value})
    if setting.startswith("STORAGE"):
        broken.environment["ADAPTORY_STORAGE__KIND"] = "local"
    ran = broken("doctor", "--json")
    assert ran.code == (0 if failed == "access" else 1), ran.err
    assert {name for name, state in states(ran).items() if state != "ok"} == {failed}
    assert checks(ran)[failed]["next_step"]


def test_a_server_that_is_not_there_is_said(on_disk: Cli) -> None:
    away = replace(on_disk, environment=on_disk.environment | {"ADAPTORY_URL": "http://127.0.0.1:9"})
    ran = away("doctor", "--json")
    assert (ran.code, states(ran)) == (1, {"server": "error"})


@pytest.mark.on("PostgreSQL")
def test_the_bundle_has_what_a_bug_report_needs_and_no_secret(
    stocked_embedded: Cli, world: World, tmp_path: Path
) -> None:
    cli = stocked_embedded
    cli.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny", "--notes", "quotes better")
    secret = {
        "ADAPTORY_SIGN_IN__ISSUER": "https://login.example",
        "ADAPTORY_SIGN_IN__CLIENT_ID": "adaptory",
        "ADAPTORY_SIGN_IN__CLIENT_SECRET": "hunter2",
        "ADAPTORY_SIGN_IN__ROLES": "ml-team=acme:publisher",
        "ADAPTORY_USER": "wilhelmina",
        "ADAPTORY_TOKEN": "adp_secret",
    }
    if "ADAPTORY_DATABASE_URL" in cli.environment:
        secret["ADAPTORY_DATABASE_URL"] = cli.environment["ADAPTORY_DATABASE_URL"] + "?password=swordfish"
    own = replace(cli, environment=cli.environment | secret)
    bundle = tmp_path / "report.zip"
    ran = own("doctor", "--bundle", bundle)
    assert ran.code == 0, ran.out
    with zipfile.ZipFile(bundle) as archive:
        files = {name: archive.read(name).decode() for name in archive.namelist()}
    assert set(files) == {"checks.json", "versions.json", "settings.json", "database.json"}
    texts = "".join(files.values())
    for hidden in (
        "hunter2",
        "swordfish",
        "wilhelmina",
        "adp_secret",
        "acme",
        "quotes better",
        cli.environment.get("AWS_SECRET_ACCESS_KEY", "-?-"),
    ):
        assert hidden not in texts, hidden
    assert json.loads(files["database.json"])["rows"]["releases"] == 1
    assert "safetensors" in json.loads(files["versions.json"])["packages"]
    assert set(json.loads(files["settings.json"])["sign_in"]["client_secret"]) == {"*"}
    assert own("doctor", "--bundle", bundle).code == 4


def test_no_output_has_a_password_of_the_database_however_it_is_spelled(on_disk: Cli, tmp_path: Path) -> None:
    hidden = 'fish/fish?fish "fish\\fish'
    url = f"postgresql://ada:{hidden}@127.0.0.1:9/registry?sslpassword=fish"
    assert "fish" not in Database(url).shown_url
    away = replace(on_disk, environment=on_disk.environment | {"ADAPTORY_DATABASE_URL": url})
    ran = away("doctor", "--bundle", tmp_path / "report.zip")
    assert ran.code == 1, ran.err
    with zipfile.ZipFile(tmp_path / "report.zip") as archive:
        texts = "".join(archive.read(name).decode() for name in archive.namelist())
    assert "127.0.0.1:9/registry" in texts
    assert "fish" not in texts + ran.out + ran.err
