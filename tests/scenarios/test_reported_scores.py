"""Scores that a model card reports are shown as reported, and never count as measured ones."""

import shutil
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from composer.formats.recipes.elsewhere import parse_content
from registry.domain.access.audit import Actor
from registry.domain.catalog import releases, suite_registration, suites
from registry.domain.catalog.repositories import Kind
from registry.errors import Conflict, NotFound
from registry.formats.references import parse_repository, parse_version
from tests.scenarios.traces import opened
from tests.scenarios.world import Cli, World


def reporting(world: World, directory: Path, *results: dict[str, Any], hle: object = None) -> Path:
    """The adapter sql with a card that reports these results, and with a file of results of HLE."""
    shutil.copytree(world.adapters["sql"], directory)
    card = {"model-index": [{"name": "x", "results": list(results)}]}
    (directory / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n# A card\n")
    if hle is not None:
        (directory / ".eval_results").mkdir()
        (directory / ".eval_results" / "hle.yaml").write_text(yaml.safe_dump(hle))
        (directory / ".eval_results" / "run.sh").write_text("echo no")
    return directory


def of(dataset: str, **metrics: object) -> dict[str, Any]:
    rows = [{"type": name, "value": value} for name, value in metrics.items()]
    return {"task": {"type": "text-generation"}, "dataset": {"type": dataset, "name": dataset}, "metrics": rows}


def test_a_push_records_what_its_card_reports_and_says_what_it_cannot_use(
    stocked: Cli, world: World, tmp_path: Path
) -> None:
    hle = [{"dataset": {"id": "cais/hle", "task_id": "default", "revision": "55"}, "value": 20.9}]
    results = (of("squad", f1=0.5, fancy=1.0), of("sql-exact", accuracy=0.9, nll=-3.0, rouge_l=0.4))
    pushed = stocked.ok(
        "push", reporting(world, tmp_path / "out", *results, hle=hle), "acme/sql:1.0.0", "--base", "tiny"
    )
    warnings = [line for line in pushed.err.splitlines() if "model-index" in line]
    assert len(warnings) == 3
    assert "whether higher or lower fancy is better is not known" in warnings[0]
    assert any("nll = -3 of sql-exact is not kept" in line for line in warnings)
    assert any("sql-exact does not state whether higher or lower rouge_l" in line for line in warnings)
    shown = stocked.json("show", "acme/sql:1.0.0")
    rows = {f"{row['suite']}.{row['metric']}": row for row in shown["scores"]}
    assert {name: row["value"] for name, row in rows.items()} == {
        "reported-cais-hle.score": 20.9,
        "reported-squad.f1": 0.5,
        "sql-exact.accuracy": 0.9,
    }
    assert all((row["reported"], row["n"]) == (True, 0) for row in rows.values())
    assert rows["reported-cais-hle.score"]["source"] == ".eval_results/hle.yaml, revision 55"
    assert {row["path"] for row in shown["files"]} >= {".eval_results/hle.yaml", "README.md"}
    assert "reported README.md (model-index)" in " ".join(stocked.ok("--wide", "show", "acme/sql:1.0.0").out.split())
    assert "accuracy 0.900 reported" in " ".join(stocked.ok("--wide", "search").out.split())
    assert stocked.json("suite", "list")["items"][0]["name"] != "reported-squad"
    assert all(not row["name"].startswith("reported-") for row in stocked.json("suite", "list")["items"])
    pulled = tmp_path / "pulled"
    stocked.ok("pull", "acme/sql:1.0.0", "-o", pulled)
    assert yaml.safe_load((pulled / ".eval_results" / "hle.yaml").read_text()) == hle


def test_a_reported_score_passes_a_plain_rule_and_no_policy_that_asks_for_measured_ones(
    stocked_embedded: Cli, world: World, tmp_path: Path
) -> None:
    cli = stocked_embedded
    card = reporting(world, tmp_path / "out", of("sql-exact", accuracy=0.9), of("squad", f1=0.5))
    cli.ok("push", card, "acme/sql:1.0.0", "--base", "tiny")
    rules = ["sql-exact.accuracy >= 0.5", "reported-squad.f1 >= 0.5"]
    policy = tmp_path / "policy.yaml"
    policy.write_text(yaml.safe_dump({"version": 1, "rules": rules, "measured": True, "missing": "refuse"}))
    never = cli("policy", "set", "acme/sql@prod", policy)
    assert (never.code, "scores of reported-squad are only reported" in never.err) == (2, True), never.err
    policy.write_text(yaml.safe_dump({"version": 1, "rules": rules[:1], "measured": True, "missing": "refuse"}))
    cli.ok("policy", "set", "acme/sql@prod", policy)
    refused = cli("promote", "acme/sql:1.0.0", "--to", "prod")
    assert (refused.code, refused.err.count("it is reported, not measured")) == (1, 1)
    policy.write_text(yaml.safe_dump({"version": 1, "rules": rules[:1], "min_n": 2, "missing": "refuse"}))
    cli.ok("policy", "set", "acme/sql@prod", policy)
    assert "n is not stated, and at least 2 are needed" in cli("promote", "acme/sql:1.0.0", "--to", "prod").err
    policy.write_text(yaml.safe_dump({"version": 1, "rules": rules}))
    cli.ok("policy", "set", "acme/sql@prod", policy)
    cli.ok("promote", "acme/sql:1.0.0", "--to", "prod")
    policy.write_text(yaml.safe_dump({"version": 1, "rules": rules[:1], "measured": True}))
    cli.ok("policy", "set", "acme/sql@prod", policy)
    cli.ok("push", world.adapters["other-sql"], "acme/sql:1.1.0", "--base", "tiny")
    waiting = cli.json("promote", "acme/sql:1.1.0", "--to", "prod", "--no-wait")
    assert waiting["gates"][0]["waiting"], "a worker can measure this one"


def test_an_import_never_replaces_a_measured_score_and_fixes_no_direction(
    stocked_embedded: Cli, world: World, tmp_path: Path
) -> None:
    cli = stocked_embedded
    card = reporting(world, tmp_path / "out", of("sql-exact", accuracy=0.9, rouge_l=0.5))
    cli.ok("push", card, "acme/sql:1.0.0", "--base", "tiny")
    cli.ok("eval", "acme/sql:1.0.0", "--suite", "sql-exact")
    imported = cli.json("score", "import", "acme/sql:1.0.0")
    assert imported["scores"] == []
    assert "sql-exact.accuracy is measured" in imported["warnings"][0]["message"]
    assert [row["reported"] for row in cli.json("show", "acme/sql:1.0.0")["scores"]] == [False, False]
    cli.ok("score", "delete", "acme/sql:1.0.0", "sql-exact.accuracy")
    assert "0.900 9" not in cli.ok("score", "import", "acme/sql:1.0.0").out
    again = cli.json("score", "import", "acme/sql:1.0.0")
    assert [(row["metric"], row["value"]) for row in again["scores"]] == [("accuracy", 0.9)]
    assert "does not state whether higher or lower rouge_l" in again["warnings"][0]["message"]
    assert cli("gate", "acme/sql@prod", "--rule", "sql-exact.rouge_l >= 0.1").code == 3


def test_the_benchmarks_of_a_private_card_are_found_only_by_those_who_may_read_it(
    stocked_embedded: Cli, world: World, tmp_path: Path
) -> None:
    cli, now = stocked_embedded, datetime.now(UTC)
    cli.ok("push", reporting(world, tmp_path / "out", of("acme/secret", f1=0.5)), "acme/sql:1.0.0", "--base", "tiny")
    reader, stranger = Actor("rita", now, {"acme": "reader"}), Actor("sven", now, {"elsewhere": "admin"})
    with closing(opened(cli)) as resources, resources.read() as session:
        assert suites.find(session, "reported-acme-secret", reader).examples == 0
        for actor in (stranger, None):
            with pytest.raises(NotFound, match="'reported-acme-secret' does not exist"):
                suites.find(session, "reported-acme-secret", actor)
        release = releases.find(session, parse_repository("acme/sql"), parse_version("1.0.0"), Kind.ADAPTER)
        assert [score.suite.task for score in suites.scores_of(session, release)] == ["reported"]
    with closing(opened(cli)) as resources, resources.write() as session:
        for name in ("reported-acme-secret", "reported-no-such"):  # the same answer: it betrays neither
            examples = [{"prompt": "a", "completion": "b"}]
            content = parse_content({"name": name, "kind": "target", "chat": False, "examples": examples})
            with pytest.raises(Conflict, match="Names that begin with reported- are"):
                suite_registration.add(session, stranger, content)
    refused = cli("eval", "acme/sql", "--suite", "reported-acme-secret")
    assert (refused.code, "does not have the examples" in refused.err) == (2, True)
