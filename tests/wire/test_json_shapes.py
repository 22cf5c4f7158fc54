"""The shape of `--json`: its keys and their types, for all values."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests import services
from tests.scenarios.conftest import stock
from tests.scenarios.world import Cli, build_world
from tests.wire import snapshots

NAMES = {str: "text", bool: "true or false", int: "integer", float: "number", type(None): "null"}


def shape(value: Any) -> Any:
    """Types in place of values; a list has the shape of its first item, and a map whose keys are data has the one key
    `*`."""
    if isinstance(value, dict):
        if any("." in key or key == "prod" for key in value):
            return {"*": shape(next(iter(value.values())))}
        return {key: shape(item) for key, item in sorted(value.items())}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return NAMES[type(value)]


@pytest.fixture(scope="module", params=services.PAIRINGS)
def documents(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One document of each kind, from a registry in which everything has happened once."""
    directory: Path = tmp_path_factory.mktemp("shapes")
    world = build_world(directory)
    environ = services.pairing(request.param)
    cli = stock(Cli({"ADAPTORY_HOME": str(directory / "home"), "ADAPTORY_USER": "mia", **environ}), world)
    pushed = cli.json("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny", "--notes", "first")
    evaluated = cli.json("eval", "acme/sql", "--suite", "sql-exact")
    cli.ok("gate", "acme/sql@prod", "--rule", "sql-exact.nll<=1000")
    cli.ok("promote", "acme/sql:1.0.0", "--to", "prod", "--reason", "ready")
    cli.ok("push", world.adapters["other-sql"], "acme/sql:1.1.0", "--base", "tiny")
    cli.ok("eval", "acme/sql:1.1.0", "--suite", "sql-exact")
    return {
        "push": pushed,
        "eval": evaluated,
        "promote": cli.json("promote", "acme/sql:1.1.0", "--to", "prod", "--reason", "better"),
        "rollback": cli.json("rollback", "acme/sql@prod", "--reason", "worse"),
        "show": cli.json("show", "acme/sql:1.0.0"),
        "search": cli.json("search", "--base", "tiny"),
        "history": cli.json("history", "acme/sql@prod"),
        "list": cli.json("list"),
        "log": cli.json("log", "acme/sql"),
        "gate": cli.json("gate", "acme/sql@prod"),
        "base show": cli.json("base", "show", "tiny"),
        "inspect": cli.json("inspect", "acme/sql:1.0.0"),
        "conflicts": cli.json("conflicts", "acme/sql:1.0.0", "acme/sql:1.1.0"),
        "audit": cli.json("audit", "--subject", "acme/sql@prod"),
        "error": cli("show", "acme/unknown", "--json").json,
    }


def test_the_shapes_of_json_output_are_the_ones_in_the_snapshot(documents: dict[str, Any]) -> None:
    shapes = {name: shape(document) for name, document in documents.items()}
    snapshots.check("json_shapes.json", json.dumps(shapes, indent=1, sort_keys=True))


@pytest.mark.on("PostgreSQL")
def test_json_output_has_the_fields_that_scripts_rely_on(documents: dict[str, Any]) -> None:
    release = {
        "repository",
        "kind",
        "version",
        "commit",
        "base",
        "adapter",
        "scores",
        "yanked",
        "notes",
        "created_at",
        "created_by",
        "files",
    }
    adapter = {"type", "variant", "rank_max", "alpha", "targets", "modules", "parameters", "size_bytes", "dtype"}
    score = {"suite", "suite_digest", "metric", "value", "stderr", "n", "higher_is_better", "measured"}
    move = {
        "id",
        "repository",
        "channel",
        "kind",
        "from_version",
        "to_version",
        "actor",
        "reason",
        "forced",
        "gates",
        "at",
    }
    assert release <= set(documents["show"])
    assert adapter <= set(documents["show"]["adapter"])
    assert score <= set(documents["show"]["scores"][0])
    assert set(documents["show"]["base"]) == {"digest", "name"}
    assert set(documents["show"]["files"][0]) == {"path", "size_bytes", "sha256"}
    assert move <= set(documents["promote"])
    score = {"value", "stderr", "n", "higher_is_better"}
    gate = {"rule", "passed", "detail", *score, "limit", "at_least", "other", "sure", "policy"}
    assert set(documents["promote"]["gates"][0]) == gate
    assert documents["rollback"]["kind"] == "rollback"
    for listed in ("search", "history", "list", "log", "audit"):
        assert set(documents[listed]) == {"items", "next"}
    pair = {
        "a",
        "b",
        "risk",
        "evidence",
        "cosine",
        "input_overlap",
        "output_overlap",
        "dominance",
        "interference",
        "modules",
    }
    assert {"verdict", "pairs", "findings"} <= set(documents["conflicts"])
    assert pair <= set(documents["conflicts"]["pairs"][0])
