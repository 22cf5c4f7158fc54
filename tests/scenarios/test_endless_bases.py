"""A base that would occupy a worker for ever: by its chat template, by its config.json."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from tests.composer.small_model import TEMPLATE
from tests.doses import further
from tests.scenarios.conftest import stock
from tests.scenarios.test_evaluations import write_suite
from tests.scenarios.world import Cli, World

LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}x"
CALLS = "{% macro call() %}{{ call() }}{% endmacro %}{{ call() }}"
LISTS = "{% for a in range(99999) %}{% set b = range(99999) | list | string | length %}{% endfor %}x"


@pytest.fixture(scope="module")
def registered(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Cli, Path]:
    """A registry with an adapter for its own base, and a chat suite."""
    directory = tmp_path_factory.mktemp("registered")
    base = shutil.copytree(world.base, directory / "base")
    cli = stock(Cli({"ADAPTORY_HOME": str(directory / "home")}), World(base, world.adapters, world.suites))
    cli.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny")
    cli.ok("suite", "add", write_suite(directory, "talk", chat=True))
    return cli, base


@pytest.fixture
def based(registered: tuple[Cli, Path], world: World) -> tuple[Cli, Path]:
    """The same, whose base nobody has changed."""
    _, base = registered
    shutil.rmtree(base)
    shutil.copytree(world.base, base)
    return registered


def set_template(base: Path, template: str) -> None:
    (base / "chat_template.jinja").write_text(template)


@pytest.mark.parametrize("template", [LOOPS, *further(LISTS, CALLS), "{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}"])
def test_a_chat_template_that_loops_ends_the_job_within_seconds(based: tuple[Cli, Path], template: str) -> None:
    cli, base = based
    set_template(base, template)
    began = time.monotonic()
    refused = cli("eval", "acme/sql:1.0.0", "--suite", "talk", "--queue")
    assert time.monotonic() - began < 120
    assert refused.code != 0
    job = cli.json("jobs")["items"][0]
    assert (job["state"], job["error"]["code"]) == ("failed", "chat_template_endless"), job


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no\\x1b[2J system') }}", "{{ 1 / 0 }}", "{{ a.b.c }}", "{% x %}"]
)
def test_a_chat_template_that_fails_is_an_error_of_its_base(based: tuple[Cli, Path], template: str) -> None:
    cli, base = based
    set_template(base, template)
    assert cli("eval", "acme/sql:1.0.0", "--suite", "talk", "--queue").code == 6
    error = cli.json("jobs")["items"][0]["error"]
    assert (error["code"], "chat template of the base base fails" in error["detail"]) == ("chat_template_failed", True)
    assert error["detail"].isprintable()


def test_a_chat_template_within_the_budget_renders_as_transformers_does(world: World, tmp_path: Path) -> None:
    from transformers.models.auto.tokenization_auto import AutoTokenizer

    from composer.evaluation.model import load_model

    base = tmp_path / "base"
    shutil.copytree(world.base, base)
    turns = [{"role": "user", "content": f"say {number}"} for number in range(50)]
    for template in (TEMPLATE, "{% for turn in messages %}{{ loop.index }}{{ turn.content | upper }}{% endfor %}"):
        set_template(base, template)
        plain: Any = AutoTokenizer.from_pretrained(base, local_files_only=True)
        guarded = load_model(base, "cpu").tokenizer
        for options in ({"tokenize": False}, {"add_generation_prompt": True, "return_dict": True}):
            assert guarded.apply_chat_template(turns, **options) == plain.apply_chat_template(turns, **options)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 3_000_000), ("vocab_size", 10**12), ("intermediate_size", 10**9), ("num_layers", 1e9),
        ("num_labels", 3_000_000), ("attention_types", [[["global", "local"], 500_000_000]]),
        ("rope_parameters", {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 1e9}),
        ("vision", {"depth": 2_000_000}),
    ],
)  # fmt: skip
def test_a_configuration_beyond_its_tensors_is_refused_at_once(based: tuple[Cli, Path], field: str, value: Any) -> None:
    cli, base = based
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {field: value}))
    began = time.monotonic()
    refused = cli("eval", "acme/sql:1.0.0", "--suite", "sql-exact")
    assert time.monotonic() - began < 30
    said = " ".join(refused.err.split())
    assert (refused.code, f"config.json: {field}" in said, "allow" in said) == (6, True, True), refused.err


DOUBLED = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
LONGER = {"type": "Replace", "pattern": {"Regex": "a*"}, "content": "a" * 40}


@pytest.mark.parametrize(
    ("part", "steps"),
    [
        ("normalizer", {"type": "Sequence", "normalizers": [DOUBLED] * 33}),
        ("normalizer", {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [LONGER] * 2}] * 9}),
        ("decoder", {"type": "Sequence", "decoders": [DOUBLED] * 33}),
    ],
)
def test_a_tokenizer_that_makes_gigabytes_of_a_line_is_refused(
    based: tuple[Cli, Path], part: str, steps: dict[str, Any]
) -> None:
    cli, base = based
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    honest = {"type": "Replace", "pattern": {"String": " "}, "content": " "}
    for asked, code in ((honest, 0), (steps, 6)):
        (base / "tokenizer.json").write_text(json.dumps(tokenizer | {part: asked}))
        ran = cli("eval", "acme/sql:1.0.0", "--suite", "sql-exact", "--limit", 1)
        assert (ran.code, f"its {part} makes a text" in ran.err) == (code, bool(code)), ran.err


@pytest.mark.parametrize(
    "asked",
    [
        {"model_type": "nemotron_h", "hybrid_override_pattern": "M" * 200_000},
    ],
)
def test_a_configuration_builds_no_more_modules_than_its_tensors_account_for(
    world: World, tmp_path: Path, asked: dict[str, Any]
) -> None:
    from composer.errors import InvalidFile
    from composer.evaluation.model import load_model

    base = tmp_path / "base"
    shutil.copytree(world.base, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | asked))
    began = time.monotonic()
    with pytest.raises(InvalidFile) as refused:
        load_model(base)
    assert time.monotonic() - began < 30
    assert (refused.value.code, "modules" in refused.value.message) == ("bad_config", True), refused.value.message
