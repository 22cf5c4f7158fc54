"""Values at the limits of a database: each is refused, equally by every database. Also unusable numbers and files on a
command line."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from registry.errors import Invalid, Usage
from tests.scenarios.traces import api_of
from tests.scenarios.world import Cli, World


@pytest.mark.on("PostgreSQL")
def test_a_moment_outside_of_the_calendar_is_refused(embedded: Cli) -> None:
    for option, moment in (("--since", "0001-01-01T00:00:00+14:00"), ("--until", "9999-12-31T23:59:59-00:01")):
        refused = embedded("audit", option, moment)
        assert refused.code == 6
        assert option.removeprefix("--") in refused.err
        assert "years 1 to 9999" in refused.err


@pytest.mark.on("SQLite")
def test_a_text_with_a_nul_is_refused_by_every_database_alike(stocked: Cli, world: World) -> None:
    release = "/v1/adapters/acme/sql/releases/1.0.0"
    stocked.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny")
    bodies: list[tuple[str, dict[str, object]]] = [
        (f"{release}/yank", {"reason": "a\0b"}),
        ("/v1/tokens", {"name": "a\0b"}),
        ("/v1/compositions", {"recipe": {"notes": ["a\0b"]}}),
        ("/v1/compositions", {"recipe": {"a\0b": 1}}),
    ]
    with api_of(stocked) as api:
        for path, body in bodies:
            with pytest.raises(Invalid) as raised:
                api.post(path, body)
            assert raised.value.code == "bad_value", path
        with pytest.raises(Invalid, match="subject contains a NUL"):
            api.get("/v1/audit", subject="a\0b")
        with pytest.raises(Usage) as refused_cursor:
            api.get("/v1/adapters", cursor="AA")  # a NUL in base64
        assert refused_cursor.value.code == "bad_cursor"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--weights", "1,1e13"), 2, "--weights 1,1e13 is not 2 numbers of magnitude 1e+12 at most"),
        (("--rule", "1" * 5000 + ":0=1"), 2, "the number of an adapter, 1 to 2"),
        (("--rule", "1:0=1e13"), 2, "'1e13' is not a number of at most 1e+12 in magnitude"),
        (("--set", "lambda=1e13"), 2, "It is a number of at most 1e+12 in magnitude"),
        (("--set", "lambda=" + "[" * 100_000), 2, "The setting lambda is '[["),
        (("--set", "lambda=1_0"), 2, "The setting lambda is '1_0'"),
        (("--method", "dare_ties", "--set", "seed=9007199254740993"), 2, "The setting seed is 9007199254740993"),
    ],
)
def test_a_number_that_is_none_or_too_large_is_refused(
    arguments: tuple[str, ...], code: int, message: str, on_disk: Cli, world: World
) -> None:
    ran = on_disk("conflicts", world.adapters["sql"], world.adapters["support"], *arguments)
    assert (ran.code, ran.out) == (code, "")
    assert message in ran.err


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"gates": ["sql-exact.accuracy keeps 0.\uff19 of inputs"]}, "is not a valid gate rule"),
        ({"gates": ["sql-exact.nll within \uff10.1 of base"]}, "is not a valid gate rule"),
        ({"gates": ["sql-exact.nll <= 1_0"]}, "is not a valid gate rule"),
        ({"gates": ["sql-exact.nll keeps 0.9 of inputs"]}, "nll is better when lower"),
        ({"gates": ["sql-exact.rouge_l >= 0.5"]}, "a composition measures nll and accuracy, not rouge_l"),
        ({"notes": "x" * 20_001}, "Notes are limited to 20,000 characters"),
    ],
)
def test_a_composition_that_could_not_end_well_is_refused_before_any_work(
    stocked_embedded: Cli, world: World, tmp_path: Path, recipe: dict[str, object], message: str
) -> None:
    cli, path = stocked_embedded, tmp_path / "recipe.yaml"
    cli.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny")
    document = {"inputs": ["acme/sql:1.0.0"], "method": "stack", "adapter": "acme/sum:1.0.0", "evaluate": ["sql-exact"]}
    path.write_text(yaml.safe_dump({**document, **recipe}))
    for words in (("compose", path, "--plan"), ("compose", path)):
        refused = cli(*words)
        assert (refused.code != 0, message in refused.err) == (True, True), refused.err
    assert cli.json("jobs")["items"] == []


def test_a_gate_takes_ascii_numbers_and_keeps_what_is_better_when_higher(stocked_embedded: Cli, world: World) -> None:
    cli = stocked_embedded
    cli.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny")
    for rule in (
        "sql-exact.accuracy >= \uff10.5",
        "sql-exact.nll within 0.\uff11 of base",
        "sql-exact.nll keeps 0.9 of inputs",
    ):
        assert cli("gate", "acme/sql@prod", "--rule", rule).code == 2, rule
    cli.ok("gate", "acme/sql@prod", "--rule", "sql-exact.accuracy keeps 0.9 of inputs")


def test_a_rank_that_is_given_twice_is_refused(on_disk: Cli, world: World, tmp_path: Path) -> None:
    ran = on_disk(
        "combine", "--adapter", world.adapters["sql"], "-o", tmp_path / "out", "--rank", "3", "--set", "rank=4"
    )
    assert ran.code == 2
    assert "--rank and --set rank" in ran.err
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_a_command_whose_output_nobody_takes_does_its_work(world: World, tmp_path: Path) -> None:
    command = (
        f"{sys.executable} -m registry.cli.start combine --adapter {world.adapters['sql']} -o {tmp_path / 'out'} >&-"
    )
    ran = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)  # noqa: S602
    assert (ran.returncode, ran.stderr) == (0, "")
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_a_file_without_an_end_is_read_as_far_as_it_may_go(on_disk: Cli, world: World, tmp_path: Path) -> None:
    pair = ("conflicts", world.adapters["sql"], world.adapters["support"], "--base", world.base)
    for command in (
        (*pair, "--policy", "/dev/zero"),
        (*pair, "--prompts", "/dev/zero"),
        (*pair, "--probe", "1", "--suite", "/dev/zero", "--suite", "/dev/zero"),
        ("compose", "/dev/zero"),
    ):
        ran = on_disk(*command)
        assert (ran.code, ran.out) == (6, "")
        assert "/dev/zero is larger than the " in ran.err
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("inputs: [acme/sql]\n" + "# " + "x" * 200_000)
    assert "recipe.yaml is larger than the 200,000 bytes allowed" in on_disk("compose", recipe).err
