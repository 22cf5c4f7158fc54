"""A job on GitHub publishes without a secret: the Hub's own client makes the exchange, against a real server."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import services
from tests.access.issuer import AUDIENCE, Issuer, issuer
from tests.scenarios.conftest import USER, Templates
from tests.scenarios.hub_client import CONFIG
from tests.scenarios.traces import hashes
from tests.scenarios.world import Cli, World, server

JOB = """
import json
from huggingface_hub import HfApi, get_token
print(json.dumps([HfApi().whoami()["name"], get_token()]))
"""


@dataclass(frozen=True)
class Ci:
    """A registry with a rule for the jobs of acme/training, at `url`. The repository does not exist yet."""

    issuer: Issuer
    url: str
    host: Cli
    rule: dict[str, Any]


@pytest.fixture
def ci(templates: Templates, tmp_path: Path) -> Generator[Ci]:
    home = tmp_path / "server"
    with issuer() as local:
        environment = templates.copy(services.PAIRINGS[0], home) | {
            "ADAPTORY_HOME": str(home), "ADAPTORY_ACCESS": "tokens", "ADAPTORY_USER": USER,
            "ADAPTORY_OIDC_AUDIENCE": AUDIENCE, "ADAPTORY_OIDC_ISSUERS": f"github:{local.url}",
        }  # fmt: skip
        host = Cli(environment)
        host.ok("namespace", "set", "acme")
        host.ok("token", "create", "--user", "olga")
        rule = [
            "acme/sql",
            "--issuer",
            "github",
            "--project",
            "acme/training",
            "--environment",
            "release",
            "--workflow",
            "release.yml",
        ]
        made = host.json("publisher", "add", *rule)
        assert made == host.json("publisher", "add", *rule)
        with server(home, **environment) as (url, _):
            yield Ci(local, url, host, made)


def test_a_job_publishes_with_the_token_that_the_client_got_for_it(ci: Ci, world: World, tmp_path: Path) -> None:
    ci.issuer.serve("/mint", {"value": ci.issuer.token()})
    user, token = json.loads(
        _run(
            [sys.executable, "-c", JOB],
            {
                "HF_ENDPOINT": ci.url, "HF_OIDC_RESOURCE": "acme/sql", "HF_HOME": str(tmp_path / "cache"),
                "GITHUB_ACTIONS": "true", "ACTIONS_ID_TOKEN_REQUEST_URL": f"{ci.issuer.url}/mint",
                "ACTIONS_ID_TOKEN_REQUEST_TOKEN": "of the runner",
            },
        ).stdout
    )  # fmt: skip
    assert ("audience", ci.url) in ci.issuer.queries
    job = Cli({"ADAPTORY_HOME": str(tmp_path / "job"), "ADAPTORY_URL": ci.url, "ADAPTORY_TOKEN": token})
    pushed = job.json("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny")
    assert pushed["release"]["created_by"] == user == f"{ci.issuer.url[7:]}/acme/training"
    elsewhere = job("push", world.adapters["sql"], "acme/other:1.0.0", "--base", "tiny")
    assert (elsewhere.code, "does not have the role publisher in acme" in elsewhere.err) == (5, True)
    [listed] = ci.host.json("publisher", "list", "acme/sql")["items"]
    assert (listed["id"], listed["project_id"]) == (ci.rule["id"], "4711")
    assert "acme/training" in ci.host.ok("publisher", "list", "acme/sql").out
    ci.host.ok("publisher", "remove", "acme/sql", ci.rule["id"])
    assert ci.host("publisher", "remove", "acme/sql", ci.rule["id"]).code == 3
    used = {row["publisher_id"]: row["last_used_at"] for row in ci.host.json("token", "list")["items"]}
    assert used[ci.rule["id"]] is not None


@pytest.mark.long
def test_hf_upload_publishes_with_an_id_token_and_no_secret(ci: Ci, world: World, tmp_path: Path) -> None:
    """As in the jobs of docs/how-to/publish-from-ci.md: one command with each ID token, and a new repository."""
    trained = shutil.copytree(world.adapters["sql"], tmp_path / "trained")
    config = json.loads((trained / CONFIG).read_text()) | {"base_model_name_or_path": "tiny"}
    (trained / CONFIG).write_text(json.dumps(config))
    job = {"HF_ENDPOINT": ci.url, "HF_OIDC_RESOURCE": "acme/sql", "HF_HOME": str(tmp_path / "cache")}
    hf = Path(sys.executable).with_name("hf")
    first = ci.issuer.token()

    def run(*words: object, id_token: str) -> subprocess.CompletedProcess[str]:
        return _run([hf, *map(str, words)], {**job, "HF_OIDC_ID_TOKEN": id_token}, check=False)

    uploaded = run("upload", "acme/sql", trained, ".", id_token=first)
    assert uploaded.returncode == 0, uploaded.stderr
    again = run("upload", "acme/sql", trained, ".", id_token=first)
    assert (again.returncode != 0, "was exchanged before" in again.stderr) == (True, True), again.stderr
    elsewhere = run("upload", "acme/other", trained, ".", id_token=ci.issuer.token())
    assert (elsewhere.returncode != 0, "the role publisher" in elsewhere.stderr) == (True, True), elsewhere.stderr
    tagged = run("repos", "tag", "create", "acme/sql", "1.0.0", id_token=ci.issuer.token())
    assert tagged.returncode == 0, tagged.stderr
    shown = ci.host.json("show", "acme/sql:1.0.0")
    assert shown["created_by"] == f"{ci.issuer.url[7:]}/acme/training"
    assert {row["path"]: row["sha256"] for row in shown["files"]} == hashes(trained)
    events = [row["act"] for row in ci.host.json("audit", "--namespace", "acme")["items"]]
    assert (events.count("token:exchange"), "token:refuse" in events) == (3, True)


def _run(
    command: Sequence[str | Path], variables: dict[str, str], *, check: bool = True
) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "ADAPTORY_"))}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1", **variables}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0 or not check, ran.stderr
    return ran
