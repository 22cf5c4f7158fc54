"""The origin of a release, the use of its ranks and the servers that load it: read at the push, stored and shown."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from registry.errors import Invalid, NotFound
from tests.composer.handmade import factors_of, write_adapter
from tests.scenarios.traces import api_of
from tests.scenarios.world import Cli, World

CARD = """---
license: apache-2.0
base_model: acme/tiny
datasets: [acme/queries]
hyperparameters: {learning_rate: 1e-4, epochs: 3}
---
# SQL
"""
STATED = """
license: mit
trainer: trl 0.20
run_url: https://runs.example/17
code_commit: 0123abc
base_license: llama3
data:
  - {name: acme/queries, digest: "sha256:ab12", license: cc-by-4.0}
"""


@pytest.fixture
def documented(world: World, tmp_path: Path) -> Path:
    directory = tmp_path / "documented"
    shutil.copytree(world.adapters["sql"], directory)
    (directory / "README.md").write_text(CARD)
    return directory


@pytest.mark.on("SQLite")
def test_a_release_keeps_what_its_card_says_and_what_is_stated_wins(
    stocked: Cli, documented: Path, tmp_path: Path
) -> None:
    cli = stocked
    carded = cli.json("push", documented, "acme/sql:1.0.0", "--base", "tiny")["release"]["provenance"]
    assert (carded["license"], carded["base_model"], carded["trainer"]) == ("apache-2.0", "acme/tiny", None)
    assert carded["hyperparameters"] == {"learning_rate": 1e-4, "epochs": 3}
    (tmp_path / "stated.yaml").write_text(STATED)
    cli.ok("push", documented, "acme/sql:1.0.1", "--base", "tiny", "--provenance", tmp_path / "stated.yaml")
    provenance = cli.json("show", "acme/sql:1.0.1")["provenance"]
    assert (provenance["license"], provenance["trainer"], provenance["base_model"]) == ("mit", "trl 0.20", "acme/tiny")
    assert provenance["data"] == [{"name": "acme/queries", "digest": "sha256:ab12", "license": "cc-by-4.0"}]
    shown = cli.ok("show", "acme/sql:1.0.1").out
    for part in ("https://runs.example/17", "0123abc", "acme/queries sha256:ab12 cc-by-4.0", "learning_rate"):
        assert part in shown


def test_whatever_a_release_states_finds_it(stocked: Cli, world: World, documented: Path, tmp_path: Path) -> None:
    cli = stocked
    run = f"https://runs.example/{'x' * 900}"
    stated = STATED.replace("https://runs.example/17", run) + "tags: [SQL, two words]\n"
    (tmp_path / "stated.yaml").write_text(stated)
    stating = ("--provenance", tmp_path / "stated.yaml")
    cli.ok("push", documented, "acme/sql:1.0.0", "--base", "tiny", "--notes", "Trained on tickets", *stating)
    cli.ok("push", world.adapters["terraform"], "acme/terraform:1.0.0", "--base", "tiny")
    for text in (
        "trainer:trl 0.20",
        "Trainer:TRL 0.20",
        f"run_url:{run}",
        "code_commit:0123ABC",
        "base_license:llama3",
        "base_model:acme/tiny",
        "license:mit",
        "data:acme/queries",
        "data:sha256:ab12",
        "data_license:cc-by-4.0",
        "hyperparameters.learning_rate:0.0001",
        "hyperparameters.learning_rate:1e-4",
        "hyperparameters.epochs:3.0",
        "tags:sql",
        "tags:two words",
    ):
        assert _search(cli, "--provenance", text) == ["acme/sql"], text
    for text in ("trainer:trl", f"run_url:{run[:-1]}", "data:cc-by-4.0", "hyperparameters.learning_rate:3", "tags:two"):
        assert _search(cli, "--provenance", text) == [], text
    assert _search(cli, "--provenance", "trainer:trl 0.20", "--provenance", "tags:sql") == ["acme/sql"]
    assert _search(cli, "--provenance", "trainer:trl 0.20", "--provenance", "tags:python") == []
    assert _search(cli, "train", "--provenance", "tags:sql") == ["acme/sql"]
    for words in ("trainer", "trl", "0123abc", "learning_rate", "= tags"):
        assert _search(cli, words) == [], words
    with api_of(cli) as api:
        both = api.get("/v1/releases", provenance=["data:acme/queries", "license:mit"])["items"]
        assert [item["provenance"]["trainer"] for item in both] == ["trl 0.20"]


def _search(cli: Cli, *asked: object) -> list[str]:
    return [item["repository"] for item in cli.json("search", *asked)["items"]]


@pytest.mark.on("PostgreSQL")
@pytest.mark.parametrize("text", ["trainr:x", "trainer", "trainer: ", "hyperparameters:3", "hyperparameters.:3", ":x"])
def test_a_search_for_what_no_provenance_has_lists_what_there_is(stocked_embedded: Cli, text: str) -> None:
    refused = stocked_embedded("search", "--provenance", text)
    assert refused.code == 6
    assert "trainer" in refused.err
    assert "hyperparameters.NAME" in refused.err


def test_long_lists_among_the_hyperparameters_hide_nothing_else(
    stocked_embedded: Cli, documented: Path, tmp_path: Path
) -> None:
    lists = "".join(f"  list_{number}: {list(range(100))}\n" for number in range(25))
    (tmp_path / "stated.yaml").write_text(f"hyperparameters:\n{lists}tags: [sql]\ntrainer: trl\n")
    stocked_embedded.ok(
        "push", documented, "acme/sql:1.0.0", "--base", "tiny", "--provenance", tmp_path / "stated.yaml"
    )
    for text in ("tags:sql", "trainer:trl", "hyperparameters.list_0:99"):
        assert _search(stocked_embedded, "--provenance", text) == ["acme/sql"], text
    assert _search(stocked_embedded, "--provenance", "hyperparameters.list_24:99") == []


def test_a_card_that_cannot_be_read_is_a_warning_and_no_obstacle(stocked_embedded: Cli, documented: Path) -> None:
    (documented / "README.md").write_text("---\na: &a [x]\nb: *a\nlicense: mit\n---\n")
    published = stocked_embedded.json("push", documented, "acme/sql:1.0.0", "--base", "tiny")
    assert [(warning["code"], warning["severity"]) for warning in published["warnings"]] == [("provenance", "warning")]
    assert published["release"]["provenance"]["license"] is None


def test_a_readme_of_many_megabytes_is_no_card(stocked_embedded: Cli, documented: Path) -> None:
    (documented / "README.md").write_text(CARD + "x" * 2_000_000)
    published = stocked_embedded.json("push", documented, "acme/sql:1.0.0", "--base", "tiny")
    assert published["release"]["provenance"]["license"] is None


def test_what_is_misspelt_is_refused_by_the_command_and_by_the_registry(
    stocked_embedded: Cli, documented: Path, tmp_path: Path
) -> None:
    cli = stocked_embedded
    (tmp_path / "stated.yaml").write_text("run_ulr: https://runs.example/17")
    refused = cli("push", documented, "acme/sql:1.0.0", "--base", "tiny", "--provenance", tmp_path / "stated.yaml")
    assert refused.code == 6
    assert "run_ulr" in refused.err
    (tmp_path / "stated.yaml").write_text("data: [{digest: ab12}]")
    refused = cli("push", documented, "acme/sql:1.0.0", "--base", "tiny", "--provenance", tmp_path / "stated.yaml")
    assert (refused.code, "data of the provenance cannot be used: an item has a name" in refused.err) == (6, True)
    with api_of(cli) as api:
        request = {"version": "1.0.0", "base": "tiny", "files": [{"path": "a", "size_bytes": 1, "sha256": "a" * 64}]}
        for stated in ({"run_ulr": "x"}, {"license": "x" * 101}, {"hyperparameters": {"a": {"b": 1}}}):
            with pytest.raises(Invalid):
                api.post("/v1/adapters/acme/sql/releases", {**request, "provenance": stated})


def test_a_release_tells_which_ranks_it_uses_and_the_push_hints_at_it(stocked: Cli, tmp_path: Path) -> None:
    cli, names = stocked, [f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]
    strong, idle = ([size * part for part in (4.0, 1.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1)] for size in (1, 1e-4))
    factors = dict(zip(names, (factors_of(strong, 32, 32), factors_of(idle, 32, 32)), strict=True))
    write_adapter(tmp_path / "a", factors, dtype=torch.float32)
    pushed = cli.ok("push", tmp_path / "a", "acme/sql:1.0.0", "--base", "tiny", "--json")
    assert {warning["code"] for warning in pushed.json["warnings"]} == {"rank_unused", "near_zero_modules"}
    assert "Rank 8, but 95 % of the energy is in 2" in pushed.err
    summary = cli.json("show", "acme/sql")["adapter"]["spectrum"]
    assert (summary["rank_95"], summary["near_zero"]) == (2, 1)
    with api_of(cli) as api:
        spectrum = api.get("/v1/adapters/acme/sql/releases/1.0.0/spectrum")
        with pytest.raises(NotFound):
            api.get("/v1/adapters/acme/sql/releases/1.0.1/spectrum")
    assert {name: spectrum[name] for name in summary} == summary
    assert spectrum["modules"][0]["energy"] == {"1": 0.9379, "2": 0.9965, "4": 0.9977}
    assert cli.json("show", "acme/sql", "--modules") == spectrum
    table = cli.ok("show", "acme/sql", "--modules", "--wide").out
    assert "at R: energy kept at rank R" in table
    assert re.search(rf"{re.escape(names[0])} .* 93.8% .* 99.7%", table)
    assert [(row["module"], row["near_zero"]) for row in spectrum["modules"]] == [(names[0], False), (names[1], True)]
    inspected = cli.json("inspect", tmp_path / "a")
    assert inspected["adapter"]["spectrum"] == summary
    assert {finding["code"] for finding in inspected["findings"]} == {"rank_unused", "near_zero_modules"}


def test_a_release_tells_who_loads_it_and_why_others_do_not(stocked: Cli, world: World) -> None:
    plain = stocked.json("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny")["release"]
    assert (plain["servers"], plain["loading"]) == (["vllm", "sglang", "lorax", "llamacpp", "peft"], {})
    patterned = stocked.json("push", world.adapters["support"], "acme/support:1.0.0", "--base", "tiny")["release"]
    assert patterned["servers"] == ["llamacpp", "peft"]
    assert set(patterned["loading"]) == {"vllm", "sglang", "lorax"}
    assert "rank_pattern" in patterned["loading"]["vllm"]["reasons"][0]
    assert "fold" in patterned["loading"]["vllm"]["way_out"][0]


def test_inspect_checks_the_fit_to_a_directory_as_to_a_registered_base(stocked_embedded: Cli, world: World) -> None:
    registered = stocked_embedded.json("inspect", world.adapters["sql"], "--base", "tiny")
    assert stocked_embedded.json("inspect", world.adapters["sql"], "--base", world.base) == registered
    stocked_embedded.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny")
    assert (
        stocked_embedded.json("inspect", "acme/sql:1.0.0", "--base", world.base)["findings"] == registered["findings"]
    )
