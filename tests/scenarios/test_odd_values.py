"""Values at the edge of what a database keeps: each is refused, and by every database alike. And numbers and files of a
command line that nothing can be made of."""

import subprocess
import sys
from pathlib import Path

import pytest

from registry.errors import Invalid, Usage
from tests.scenarios.traces import api_of
from tests.scenarios.world import Cli, World


def test_a_moment_outside_of_the_calendar_is_refused(embedded: Cli) -> None:
    for option, moment in (("--since", "0001-01-01T00:00:00+14:00"), ("--until", "9999-12-31T23:59:59-00:01")):
        refused = embedded("audit", option, moment)
        assert refused.code == 6
        assert option.removeprefix("--") in refused.err
        assert "years 1 to 9999" in refused.err


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
        with pytest.raises(Usage, match="subject has a NUL"):
            api.get("/v1/audit", subject="a\0b")
        with pytest.raises(Usage) as refused_cursor:
            api.get("/v1/adapters", cursor="AA")  # a NUL in base64
        assert refused_cursor.value.code == "bad_cursor"


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("--weights", "1,1e13"), 2, "--weights 1,1e13 is not 2 numbers of at most 1e+12 in size"),
        (("--rule", "1" * 5000 + ":0=1"), 2, "the number of an adapter, 1 to 2"),
        (("--rule", "1:0=1e13"), 1, "'1e13' is not a number of at most 1e+12 in size"),
        (("--set", "lambda=1e13"), 2, "It is a number of at most 1e+12 in size"),
        (("--set", "lambda=" + "[" * 100_000), 2, "The setting lambda is '[["),
        (("--set", "lambda=1_0"), 2, "The setting lambda is '1_0'"),
        (("--method", "dare_ties", "--set", "seed=9007199254740993"), 2, "The setting seed is 9007199254740993"),
    ],
)
def test_a_number_that_is_none_or_too_large_is_refused(
    arguments: tuple[str, ...], code: int, told: str, on_disk: Cli, world: World
) -> None:
    ran = on_disk("conflicts", world.adapters["sql"], world.adapters["support"], *arguments)
    assert (ran.code, ran.out) == (code, "")
    assert told in ran.err


def test_a_rank_that_is_given_twice_is_refused(on_disk: Cli, world: World, tmp_path: Path) -> None:
    ran = on_disk(
        "combine", "--adapter", world.adapters["sql"], "-o", tmp_path / "out", "--rank", "3", "--set", "rank=4"
    )
    assert ran.code == 2
    assert "--rank and --set rank" in ran.err
    assert not (tmp_path / "out").exists()


def test_a_command_whose_output_nobody_takes_does_its_work(world: World, tmp_path: Path) -> None:
    command = (
        f"{sys.executable} -m registry.cli.main combine --adapter {world.adapters['sql']} -o {tmp_path / 'out'} >&-"
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
