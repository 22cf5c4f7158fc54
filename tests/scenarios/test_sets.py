"""A set of adapters with a router as a release: composed, measured, judged, promoted and rolled back."""

import json
import sys
from pathlib import Path
from subprocess import run
from typing import Any

import pytest
import yaml

from composer.deltas.variants.load import load_deltas
from composer.evaluation.model import load_model
from composer.formats.sets.adapter_set import SET_FILE, read_set
from registry.errors import RegistryError
from tests.composer.optimize.test_optimize import suite_of
from tests.registry.api.test_pages import single_user
from tests.scenarios.test_crashes import resources_of
from tests.scenarios.traces import api_of
from tests.scenarios.world import Cli, World

MEMBERS = ("sql", "support")
RECIPE: dict[str, Any] = {
    "inputs": [{"adapter": f"acme/{name}@prod", "suite": f"{name}-exact"} for name in MEMBERS],
    "set": "acme/assistants:1.0.0",
    "evaluate": ["guard-exact"],
}


def compose(cli: Cli, directory: Path, **changes: Any) -> Any:
    path = directory / "set.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in (RECIPE | changes).items() if value is not None}))
    return cli("compose", path, "--follow", "--json")


def score(cli: Cli, ref: str, suite: str) -> dict[str, Any]:
    (row,) = [
        row for row in cli.json("show", ref)["scores"] if (row["suite"], row["metric"]) == (f"{suite}-exact", "nll")
    ]
    return row


def test_a_set_is_measured_promoted_and_rolled_back_like_any_release(small_team: Cli, tmp_path: Path) -> None:
    done = compose(small_team, tmp_path).json
    assert done.get("state") == "done", done
    assert [(row["repository"], row["version"]) for row in done["results"]] == [("acme/assistants", "1.0.0")]
    assert done["lock"]["set"] is True
    assert {row["suite"] for row in done["candidate_scores"]} == {"sql-exact", "support-exact", "guard-exact"}
    assert all(gate["passed"] for gate in done["gates"]), "each member answers its own prompts as it does alone"
    reworded = {row["suite"]: row["reworded"] for row in done["candidate_scores"] if "reworded" in row}
    assert reworded.keys() == {"sql-exact", "support-exact"}
    assert all(row["still_answered"] <= row["answered"] <= 6 for row in reworded.values())

    release = small_team.json("show", "acme/assistants:1.0.0")
    assert release["kind"] == "set"
    assert release["set"]["members"] == ["sql", "support"]
    assert [row["repository"] for row in release["inputs"]] == ["acme/sql", "acme/support"]
    small_team.ok("pull", "acme/assistants:1.0.0", "-o", tmp_path / "pulled")
    pulled = read_set(tmp_path / "pulled" / SET_FILE)
    assert {name: member.repository for name, member in pulled.members.items()} == {
        "sql": "acme/sql",
        "support": "acme/support",
    }
    assert [pulled.routes.choose(f"{name} 77") for name in MEMBERS] == ["sql", "support"]

    for name in MEMBERS:
        for ref in ("acme/assistants:1.0.0", f"acme/{name}"):
            small_team.ok("eval", ref, "--suite", f"{name}-exact")
        own, alone = (score(small_team, ref, name) for ref in ("acme/assistants:1.0.0", f"acme/{name}"))
        assert own["n"] == alone["n"]
        assert own["value"] == pytest.approx(alone["value"], abs=1e-6)

    small_team.ok("promote", "acme/assistants:1.0.0", "--to", "prod", "--new-channel")
    assert compose(small_team, tmp_path, set="acme/assistants:1.1.0").json["state"] == "done"
    small_team.ok("promote", "acme/assistants:1.1.0", "--to", "prod")
    small_team.ok("rollback", "acme/assistants@prod", "--reason", "as before")
    assert small_team.json("show", "acme/assistants@prod")["version"] == "1.0.0"


def test_commands_for_one_adapter_say_that_it_is_a_set_and_its_attestations_are_verified(
    small_team: Cli, tmp_path: Path
) -> None:
    assert compose(small_team, tmp_path).json["state"] == "done"
    ref = "acme/assistants:1.0.0"
    for words in (("inspect", ref), ("conflicts", ref, "acme/sql")):
        refused = small_team(*words)
        assert (refused.code, "is a set of adapters" in refused.err) == (6, True), refused.err
    assert "of the kind set" in small_team("diff", "acme/sql:1.0.0", ref).err
    assert f"composition of {ref} attested by worker" in small_team.ok("verify", ref).out


def test_a_router_is_written_as_a_program_that_needs_no_package(small_team: Cli, tmp_path: Path) -> None:
    assert compose(small_team, tmp_path).json["state"] == "done"
    program = tmp_path / "router.py"
    small_team.ok("router", "acme/assistants:1.0.0", "-o", program)
    for prompt, served in (("sql 77", "acme/sql@1.0.0"), ("support 1", "acme/support@1.0.0"), ("水曜日", "base")):
        assert (
            run([sys.executable, "-I", program, prompt], check=True, capture_output=True, text=True).stdout.strip()
            == served
        )
    printed = small_team.ok("router", "acme/assistants:1.0.0").out
    compile(printed, "router.py", "exec")  # neither wrapped nor indented
    assert "choose" in printed
    for name in MEMBERS:
        (tmp_path / f"{name}.txt").write_text(f"{name} 1\n\n{name} 2\n")
    given = [word for name in MEMBERS for word in ("--prompts", f"{name}={tmp_path / name}.txt")]
    written = yaml.safe_load(small_team.ok("router", "acme/assistants:1.0.0", "--to", "litellm", *given).out)
    assert [row["model_name"] for row in written["model_list"]][1:] == ["acme/sql@1.0.0", "acme/support@1.0.0", "tiny"]
    assert (
        "support has no example prompts"
        in small_team("router", "acme/assistants:1.0.0", "--to", "litellm", *given[:2]).err
    )
    refused = small_team("router", "acme/sql:1.0.0")
    assert (refused.code, "is not a set" in refused.err) == (2, True)


def test_a_page_and_a_listing_show_a_set(small_team: Cli, tmp_path: Path) -> None:
    assert compose(small_team, tmp_path).json["state"] == "done"
    assert "acme/assistants" in small_team.ok("list").out
    shown = small_team.ok("show", "acme/assistants:1.0.0").out
    assert "sql, support" in shown
    assert "a set with a router" in shown
    assert small_team.json("search", "--kind", "set")["items"][0]["repository"] == "acme/assistants"
    with resources_of(small_team.environment) as resources, single_user(resources) as http:
        for path in ("/acme/assistants", "/acme/assistants/1.0.0", "/acme/sql/1.0.0"):
            answer = http.get(path)
            assert answer.status_code == 200
            assert "acme/assistants" in answer.text
        assert "A set of 2 adapters" in http.get("/acme/assistants/1.0.0").text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "linear"}, "method: a set combines nothing"),
        ({"adapter": "acme/one:1.0.0"}, "adapter: a set combines nothing"),
        ({"inputs": [{"adapter": "acme/sql", "weight": 0.5, "suite": "sql-exact"}]}, "inputs[0].weight: a set serves"),
        ({"set": "acme/sql:2.0.0"}, "acme/sql holds adapter releases, not set releases"),
        ({"set": "acme/assistants"}, "acme/assistants is not NAMESPACE/NAME:VERSION"),
        ({"inputs": ["acme/sql"]}, "a router is fitted on examples"),
        ({"optimize": {}}, "A search looks for one adapter"),
    ],
)
def test_a_recipe_of_a_set_that_cannot_work_is_refused_at_once(
    changes: dict[str, Any], message: str, small_team: Cli, tmp_path: Path
) -> None:
    refused = compose(small_team, tmp_path, **changes)
    assert refused.code in (2, 4, 5, 6)
    assert message in refused.err + refused.out


def test_a_set_that_nobody_composed_cannot_be_pushed(small_team: Cli, tmp_path: Path) -> None:
    assert compose(small_team, tmp_path).json["state"] == "done"
    small_team.ok("pull", "acme/assistants:1.0.0", "-o", tmp_path / "pulled")
    for kind in ("adapter", "model", "set"):
        refused = small_team("push", tmp_path / "pulled", "acme/mine:1.0.0", "--base", "tiny", "--kind", kind)
        assert refused.code != 0


def test_the_api_refuses_a_set_that_nobody_composed_also_with_the_files_of_one_that_was(
    small_team: Cli, tmp_path: Path
) -> None:
    assert compose(small_team, tmp_path).json["state"] == "done"
    files = small_team.json("show", "acme/assistants:1.0.0")["files"]
    request = {"version": "3.0.0", "base": "tiny", "files": files}
    with api_of(small_team) as api:
        for path, code in (
            ("/v1/sets/acme/assistants", "set_not_composed"),
            ("/v1/sets/acme/mine", "set_not_composed"),
            ("/v1/adapters/acme/mine", "missing_weights"),
        ):
            with pytest.raises(RegistryError) as refused:
                api.post(f"{path}/releases", request)
            assert refused.value.code == code


def test_a_member_that_was_yanked_is_no_longer_taken_into_a_set(small_team: Cli, tmp_path: Path) -> None:
    small_team.ok("yank", "acme/sql:1.0.0", "--reason", "wrong")
    refused = compose(small_team, tmp_path, inputs=["acme/sql:1.0.0", "acme/support"])
    assert refused.code != 0
    assert "yanked" in json.dumps(refused.err + refused.out)


def own_suite(cli: Cli, world: World, name: str, directory: Path) -> str:
    """Registers a suite of the adapter's own answers."""
    loaded = load_model(world.base)
    adapter = load_deltas(world.adapters[name], loaded.architecture)
    suite = suite_of(loaded, adapter, name, count=24)
    path = directory / f"{name}-own.yaml"
    path.write_text(yaml.safe_dump({**suite.to_json(), "name": f"{name}-own"}))
    cli.ok("suite", "add", path)
    return f"{name}-own"


def test_a_search_publishes_a_set_where_no_single_adapter_fits(small_team: Cli, world: World, tmp_path: Path) -> None:
    inputs = [{"adapter": f"acme/{name}", "suite": own_suite(small_team, world, name, tmp_path)} for name in MEMBERS]
    all_answers = {"thresholds": {"probe_loss": 100, "probe_answers": 1.0, "probe_guard": 100}}
    search = {"optimize": {"search": 4, "confirm": 16, "passes": 200}, "probe": 0, "policy": all_answers}
    done = compose(small_team, tmp_path, adapter="acme/one:1.0.0", inputs=inputs, **search).json
    evidence = done["lock"]["optimized"]
    assert done["state"] == "done", (done["error"], evidence["headline"])
    assert [row["repository"] for row in done["results"]] == ["acme/assistants"]
    assert evidence["choice"]["method"] == "set"
    assert {row["answer"] for row in evidence["best"]} == {"one adapter", "a set"}
    assert {row["suite"] for row in done["lock"]["calibration"]} == {"sql-own", "support-own", "guard-exact"}
    assert {row["n"] for row in done["candidate_scores"] if row["suite"] == "sql-own"} == {20}, "unseen by the router"
    assert small_team("show", "acme/one").code == 3
    with resources_of(small_team.environment) as resources, single_user(resources) as http:
        page = http.get(f"/compositions/{done['id']}").text
    assert "members with a router" in page
