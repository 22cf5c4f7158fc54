"""Push, find, promote, regret, roll back: through the command line, embedded and against real servers."""

from pathlib import Path

from tests.scenarios.conftest import USER
from tests.scenarios.world import Cli, World


def test_a_release_lives_from_push_to_rollback(stocked: Cli, world: World, tmp_path: Path) -> None:
    cli = stocked
    first = cli.json("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny", "--notes", "the first")
    assert first["created"]
    facts = first["release"]["adapter"]
    assert (facts["type"], facts["rank_max"], facts["targets"]) == ("lora", 4, ["q_proj", "v_proj"])
    cli.ok("push", world.adapters["terraform"], "acme/terraform:1.0.0", "--base", "Acme/Tiny-Llama")

    cli.ok("eval", "tiny", "--suite", "sql-exact", "--suite", "guard-exact")
    scores = cli.json("eval", "acme/sql", "--suite", "sql-exact", "--suite", "guard-exact")["scores"]
    measured = {(score["suite"], score["metric"], score["n"]) for score in scores}
    assert measured == {(suite, metric, 6) for suite in ("sql-exact", "guard-exact") for metric in ("nll", "accuracy")}
    shown = cli.json("show", "acme/sql")
    assert {score["metric"] for score in shown["scores"]} == {"nll", "accuracy"}
    assert all(score["stderr"] is not None for score in shown["scores"])

    found = cli.json(
        "search",
        "--base",
        "tiny",
        "--max-rank",
        "4",
        "--targets-within",
        "q_proj,v_proj",
        "--score",
        "sql-exact.nll<=99",
    )
    assert [release["repository"] for release in found["items"]] == ["acme/sql"]

    cli.ok("promote", "acme/sql:1.0.0", "--to", "prod", "--reason", "ready")
    cli.ok("push", world.adapters["other-sql"], "acme/sql", "--bump", "minor", "--base", "tiny")
    cli.ok("promote", "acme/sql:1.1.0", "--to", "prod", "--reason", "better")
    assert cli.json("show", "acme/sql@prod")["version"] == "1.1.0"
    moved = cli.json("rollback", "acme/sql@prod", "--reason", "it was not better")
    assert (moved["kind"], moved["from_version"], moved["to_version"], moved["actor"]) == (
        "rollback",
        "1.1.0",
        "1.0.0",
        USER,
    )

    moves = cli.json("history", "acme/sql@prod")["items"]
    assert [(move["kind"], move["to_version"], move["reason"]) for move in moves] == [
        ("rollback", "1.0.0", "it was not better"), ("promote", "1.1.0", "better"), ("promote", "1.0.0", "ready"),
    ]  # fmt: skip

    cli.ok("pull", "acme/sql@prod", "-o", tmp_path / "out")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (world.adapters["sql"] / name).read_bytes()


def test_the_same_push_again_is_a_no_op_and_other_content_is_a_conflict(stocked: Cli, world: World) -> None:
    stocked.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny")
    again = stocked.json("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny")
    assert not again["created"]
    other = stocked("push", world.adapters["other-sql"], "acme/sql:1.0.0", "--base", "tiny")
    assert other.code == 4
    assert "never changes" in other.err
    assert len(stocked.json("log", "acme/sql")["items"]) == 1


def test_yanked_releases_are_skipped_but_still_there_by_name(stocked: Cli, world: World) -> None:
    stocked.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny", "--channel", "prod")
    stocked.ok("push", world.adapters["other-sql"], "acme/sql:1.1.0", "--base", "tiny", "--channel", "prod")
    stocked.ok("yank", "acme/sql:1.1.0", "--reason", "leaks customer names")
    assert stocked.json("show", "acme/sql")["version"] == "1.0.0"
    assert stocked.json("show", "acme/sql:^1.0")["version"] == "1.0.0"
    on_channel = stocked.ok("show", "acme/sql@prod", "--json")
    assert on_channel.json["version"] == "1.0.0"
    assert "leaks customer names" in on_channel.err
    exact = stocked.ok("show", "acme/sql:1.1.0", "--json")
    assert exact.json["yanked"]
    assert "leaks customer names" in exact.err
    assert stocked("promote", "acme/sql:1.1.0", "--to", "canary").code == 1
    stocked.ok("unyank", "acme/sql:1.1.0")
    assert stocked.json("show", "acme/sql@prod")["version"] == "1.1.0"


def test_a_gate_refuses_a_worse_release_and_force_leaves_a_trace(stocked: Cli, world: World) -> None:
    cli = stocked
    for version, adapter in (("1.0.0", "sql"), ("1.1.0", "other-sql")):
        cli.ok("push", world.adapters[adapter], f"acme/sql:{version}", "--base", "tiny")
        cli.ok("eval", f"acme/sql:{version}", "--suite", "sql-exact")
    nll = {
        version: next(s["value"] for s in cli.json("show", f"acme/sql:{version}")["scores"] if s["metric"] == "nll")
        for version in ("1.0.0", "1.1.0")
    }
    better, worse = sorted(nll, key=lambda version: nll[version])
    assert nll[worse] - nll[better] > 0.01
    cli.ok("promote", f"acme/sql:{better}", "--to", "prod")
    cli.ok("gate", "acme/sql@prod", "--rule", "sql-exact.nll <= 1000", "--rule", "sql-exact.nll within 0.001 of served")
    refused = cli("promote", f"acme/sql:{worse}", "--to", "prod")
    assert refused.code == 1
    assert f"worse by {nll[worse] - nll[better]:.4g}" in refused.err
    assert "pass  sql-exact.nll <= 1000" in refused.err
    assert cli.json("show", "acme/sql@prod")["version"] == better
    assert cli("promote", f"acme/sql:{worse}", "--to", "prod", "--force").code == 2, "force needs a reason"
    forced = cli.json("promote", f"acme/sql:{worse}", "--to", "prod", "--force", "--reason", "demo at noon")
    assert forced["forced"]
    assert [gate["passed"] for gate in forced["gates"]] == [True, False]
    acts = [event["act"] for event in cli.json("audit", "--subject", "acme/sql@prod")["items"]]
    assert acts == ["channel:promote", "gate:set", "channel:promote"]


def test_lists_come_in_pages_that_neither_repeat_nor_lose(stocked_embedded: Cli, world: World) -> None:
    from registry.cli.connect import connected
    from tests.scenarios.world import environment

    for number in range(7):
        stocked_embedded.ok("push", world.adapters["sql"], f"acme/sql:1.{number}.0", "--base", "tiny")
    with environment(stocked_embedded.environment, ["adaptory"]), connected() as connection:
        for path in ("/v1/releases", "/v1/adapters/acme/sql/releases"):
            versions, cursor, sizes = [], None, []
            while True:
                page = connection.api.get(path, limit=3, cursor=cursor)
                versions += [release["version"] for release in page["items"]]
                sizes.append(len(page["items"]))
                cursor = page["next"]
                if cursor is None:
                    break
            assert versions == [f"1.{number}.0" for number in reversed(range(7))]
            assert sizes == [3, 3, 1]
