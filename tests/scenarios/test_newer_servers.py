"""Clients are replaced last: answers of a newer server have fields that this version does not know."""

import json
from collections.abc import Callable, Generator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx2
import pytest

from registry.sdk import Composition, Move, Promotion, Registry, Release, Score
from registry.sdk import results as public
from registry.wire.quality import MoveOut
from tests import services
from tests.scenarios.conftest import Templates, serving
from tests.scenarios.test_lost_answers import LEFT_OUT
from tests.scenarios.world import Cli, World, environment

NEW = "field_of_a_newer_server"
MAPS = {
    "after", "alphas", "before", "channels", "content", "detail", "energy", "gates", "grants", "headers",
    "hyperparameters", "limited", "loading", "members", "metrics", "pins", "policy", "ranks", "scope",
}  # fmt: skip
"""Objects whose keys are not fields."""


class Rewriting:
    """A proxy before a server; `change` gets each JSON document with its path."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.change: Callable[[str, Any], Any] = lambda _path, document: document


@pytest.fixture
def proxy(templates: Templates, tmp_path: Path) -> Generator[tuple[Rewriting, Cli]]:
    pairing = templates.copy(services.PAIRINGS[0], tmp_path / "server")
    with serving(pairing, tmp_path) as cli:
        rewriting = Rewriting(cli.environment["ADAPTORY_URL"])

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_arguments: object) -> None:
                """Quiet."""

            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                headers = {
                    name: value for name, value in self.headers.items() if name.lower() not in LEFT_OUT | {"host"}
                }
                answer = httpx2.request(self.command, f"{rewriting.target}{self.path}", content=body, headers=headers)
                content, kind = answer.content, answer.headers.get("content-type", "")
                if kind.startswith("application/json"):
                    content = json.dumps(rewriting.change(self.path, json.loads(content))).encode()
                self.send_response(answer.status_code)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815

        listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        cli.environment["ADAPTORY_URL"] = f"http://127.0.0.1:{listening.server_port}"
        Thread(target=listening.serve_forever, args=(0.02,), daemon=True).start()
        yield rewriting, cli
        listening.shutdown()
        listening.server_close()


def with_new_fields(value: Any) -> Any:
    """The document with a field more in each of its objects."""
    if isinstance(value, list):
        return [with_new_fields(item) for item in value]
    if not isinstance(value, dict):
        return value
    known = {
        name: one if name in MAPS and isinstance(one, dict) else with_new_fields(one) for name, one in value.items()
    }
    return {**known, NEW: {"n": 1}}


@pytest.mark.long
def test_every_command_ignores_the_fields_that_it_does_not_know_and_prints_them_as_json(
    proxy: tuple[Rewriting, Cli], world: World, tmp_path: Path
) -> None:
    rewriting, cli = proxy
    rewriting.change = lambda _path, document: with_new_fields(document)
    adapter = world.adapters["sql"]
    assert NEW in cli.json("push", adapter, "acme/sql:1.0.0", "--base", "tiny", "--channel", "prod")["release"]
    cli.ok("push", world.adapters["other-sql"], "acme/sql", "--bump", "minor", "--base", "tiny")
    changes = (
        "promote acme/sql:1.1.0 --to prod", "rollback acme/sql@prod", "yank acme/sql:1.1.0 --reason worse",
        "unyank acme/sql:1.1.0 --reason well", "score import acme/sql:1.0.0", "deprecate acme/sql:1.0.0 --reason old",
    )  # fmt: skip
    reads = (
        "show acme/sql:1.0.0", "show acme/sql --modules", "list", "log acme/sql", "search --base tiny", "audit", "jobs",
        "history acme/sql@prod", "policy show acme/sql@prod", "base list", "base show tiny", "suite list", "whoami",
        "namespace list", "namespace usage acme", "namespace members acme", "token list", "publisher list acme/sql",
        "promotion list acme/sql@prod",
    )  # fmt: skip
    for command in (*changes, *reads):
        printed = cli.json(*command.split())
        assert all(NEW in item for item in printed.get("items", [printed])), command
    for command in reads:
        cli.ok(*command.split())
    for command in ("gate acme/sql@prod", "diff acme/sql:1.0.0 acme/sql:1.1.0", "inspect acme/sql:1.0.0"):
        cli.ok(*command.split())
    cli.ok("pull", "acme/sql:1.0.0", "-o", tmp_path / "out")
    home, url = {"ADAPTORY_HOME": cli.environment["ADAPTORY_HOME"]}, cli.environment["ADAPTORY_URL"]
    with environment(home, []), Registry(url) as registry:
        assert registry.resolve("acme/sql:1.1.0").document[NEW] == {"n": 1}
        assert all(move.document[NEW] == {"n": 1} for move in registry.history("acme/sql@prod"))


@pytest.mark.parametrize(
    ("command", "address", "field"),
    [
        ("base show tiny", "/v1/bases/tiny", "digest"),
        ("whoami", "/v1/whoami", "grants"),
        ("suite list", "/v1/suites", "metrics"),
    ],
)
def test_an_answer_that_lacks_a_field_is_one_error_with_its_address_and_the_field(
    proxy: tuple[Rewriting, Cli], command: str, address: str, field: str
) -> None:
    rewriting, cli = proxy

    def without(path: str, document: Any) -> Any:
        for item in document.get("items", [document]):
            item.pop(field, None)
        return document

    rewriting.change = without
    ran = cli(*command.split())
    assert (ran.code, ran.err.splitlines()[0]) == (
        6, f"error: The registry's answer cannot be trusted: {address} lacks {field}.",
    )  # fmt: skip


def test_the_python_api_keeps_its_names_for_the_documents_of_the_registry() -> None:
    assert (public.Move, public.Release, public.Score) == (Move, Release, Score)
    assert Move is MoveOut
    assert {"from_version", "to_version", "at", "forced"} <= set(Move.model_fields)
    assert isinstance(Promotion.missing, property)
    assert isinstance(Composition.verdict, property)
    assert isinstance(Composition.published, property)
