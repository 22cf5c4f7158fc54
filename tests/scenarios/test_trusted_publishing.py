"""A job on GitHub publishes without a secret: the Hub's own client makes the exchange, against a real server."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests import services
from tests.access.issuer import AUDIENCE, issuer
from tests.scenarios.conftest import USER, Templates
from tests.scenarios.world import Cli, World, server

JOB = """
import json
from huggingface_hub import HfApi, get_token
print(json.dumps([HfApi().whoami()["name"], get_token()]))
"""


def test_a_job_publishes_with_the_token_that_the_client_got_for_it(
    templates: Templates, world: World, tmp_path: Path
) -> None:
    home = tmp_path / "server"
    with issuer() as ci:
        environment = templates.copy(services.PAIRINGS[0], home) | {
            "ADAPTORY_HOME": str(home), "ADAPTORY_ACCESS": "tokens", "ADAPTORY_USER": USER,
            "ADAPTORY_OIDC_AUDIENCE": AUDIENCE, "ADAPTORY_OIDC_ISSUERS": f"github:{ci.url}",
        }  # fmt: skip
        host = Cli(environment)
        host.ok("namespace", "set", "acme")
        host.ok("token", "create", "--user", "olga")
        rule = ["acme/sql", "--issuer", "github", "--project", "acme/training", "--environment", "release"]
        made = host.json("publisher", "add", *rule)
        assert made == host.json("publisher", "add", *rule)
        ci.serve("/mint", {"value": ci.token()})
        with server(home, **environment) as (url, _):
            user, token = _job({
                "HF_ENDPOINT": url, "HF_OIDC_RESOURCE": "acme/sql", "HF_HOME": str(tmp_path / "cache"),
                "GITHUB_ACTIONS": "true", "ACTIONS_ID_TOKEN_REQUEST_URL": f"{ci.url}/mint",
                "ACTIONS_ID_TOKEN_REQUEST_TOKEN": "of the runner",
            })  # fmt: skip
            assert ("audience", url) in ci.queries
            job = Cli({"ADAPTORY_HOME": str(tmp_path / "job"), "ADAPTORY_URL": url, "ADAPTORY_TOKEN": token})
            pushed = job.json("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny")
            assert pushed["release"]["created_by"] == user == f"{ci.url[7:]}/acme/training"
            elsewhere = job("push", world.adapters["sql"], "acme/other:1.0.0", "--base", "tiny")
            assert (elsewhere.code, "does not have the role publisher in acme" in elsewhere.err) == (5, True)
    [listed] = host.json("publisher", "list", "acme/sql")["items"]
    assert (listed["id"], listed["project_id"]) == (made["id"], "4711")
    assert "acme/training" in host.ok("publisher", "list", "acme/sql").out
    host.ok("publisher", "remove", "acme/sql", made["id"])
    assert host("publisher", "remove", "acme/sql", made["id"]).code == 3
    used = {row["publisher_id"]: row["last_used_at"] for row in host.json("token", "list")["items"]}
    assert used[made["id"]] is not None


def _job(variables: dict[str, str]) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "ADAPTORY_"))}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1", **variables}
    command = [sys.executable, "-c", JOB]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)
