"""The life of a release in Python, with the registry in this process and with a remote server that requires a token."""

import inspect
import re
import shutil
from collections.abc import Generator, Iterator
from doctest import DocTestParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset
from trl import SFTConfig

from registry import sdk
from registry.errors import Conflict, NotFound, Refused, Usage
from registry.sdk import Move, Promotion, Registry, Score
from tests import services
from tests.scenarios.conftest import USER, Templates
from tests.scenarios.test_profiles import with_stdin
from tests.scenarios.world import Cli, World, environment, server

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(params=services.PAIRINGS)
def person(request: pytest.FixtureRequest, templates: Templates, tmp_path: Path) -> Generator[Cli]:
    """A user with a token for a server of either pairing."""
    pairing = templates.copy(request.param, tmp_path / "server")
    settings = {"ADAPTORY_ACCESS": "tokens", "ADAPTORY_USER": USER, **pairing}
    host = Cli({"ADAPTORY_HOME": str(tmp_path / "server"), **settings})
    host.ok("namespace", "grant", "*", "pia", "admin")
    token = host.ok("token", "create", "--user", "pia").out.strip()
    with server(tmp_path / "server", **settings) as (url, _):
        yield Cli({"ADAPTORY_HOME": str(tmp_path / "home"), "ADAPTORY_URL": url, "ADAPTORY_TOKEN": token})


@pytest.mark.long
def test_a_release_lives_in_this_process(stocked_embedded: Cli, world: World, tmp_path: Path) -> None:
    with environment(stocked_embedded.environment, []), Registry() as registry:
        live(registry, stocked_embedded, world, tmp_path)


@pytest.mark.long
def test_a_release_lives_on_a_server_that_wants_a_token(
    person: Cli, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, token = person.environment["ADAPTORY_URL"], person.environment["ADAPTORY_TOKEN"]
    with environment({"ADAPTORY_HOME": person.environment["ADAPTORY_HOME"]}, []):
        with Registry(url, token) as registry:
            live(registry, person, world, tmp_path)
        with Registry(url) as nobody, pytest.raises(NotFound):
            nobody.resolve("acme/sql")
        with_stdin(person, token, "login", url, "--profile", "work", monkeypatch=monkeypatch)
        with Registry(profile="work") as registry:
            assert registry.resolve("acme/sql:1.0.0").repository == "acme/sql"


def live(registry: Registry, cli: Cli, world: World, directory: Path) -> None:
    """From the first push to a combination with another adapter."""
    first = registry.push(world.adapters["sql"], "acme/sql:1.0.0", base="tiny", provenance={"license": "mit"})
    assert registry.push(world.adapters["sql"], "acme/sql", bump="patch", base="tiny") == first
    second = registry.push(world.adapters["other-sql"], "acme/sql", bump="minor", base="tiny")
    terraform = registry.push(world.adapters["terraform"], "acme/terraform:1.0.0", base="tiny")
    assert (str(first), str(second), first.base, second.kind) == ("acme/sql:1.0.0", "acme/sql:1.1.0", "tiny", "adapter")
    assert first.document["provenance"]["license"] == "mit"
    assert cli.json("show", "acme/sql")["commit"] == second.commit

    scores = [
        Score(suite="sql-exact", metric="accuracy", value=0.5, n=6, reported=True, source="notebook"),
        Score(suite="guard-exact", metric="nll", value=1.5, stderr=0.1, n=6, higher_is_better=False),
    ]
    registry.record_scores(first, scores)
    assert sorted(registry.resolve(first).scores, key=lambda one: one.n + one.value) == scores
    assert [str(release) for release in registry.search(base="tiny", score="sql-exact.accuracy>=0.5")] == [str(first)]
    assert {str(release) for release in registry.search(latest=True)} == {str(second), str(terraform)}
    pages = registry.search(limit=1)
    assert len({str(release) for release in pages}) == 3

    moves(registry, cli, directory)
    pulled = registry.pull("acme/sql@prod")
    assert registry.pull(first) == pulled
    output = registry.pull(first, directory / "served")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (
            (output / file).read_bytes() == (pulled / file).read_bytes() == (world.adapters["sql"] / file).read_bytes()
        )
    with pytest.raises(Conflict):
        registry.pull(second, output)
    assert registry.pull(second, output, force=True) == output

    combinations(registry, world)
    cli.ok("yank", "acme/sql:1.1.0", "--reason", "leaks")
    with pytest.warns(UserWarning, match="leaks"):
        assert registry.resolve("acme/sql:1.1.0").yanked
    with pytest.raises(NotFound) as unknown:
        registry.resolve("acme/sql:9.0.0")
    assert unknown.value.code == "release_unknown"


def moves(registry: Registry, cli: Cli, directory: Path) -> None:
    """The channel moves forward and back, is refused, and waits for a score."""
    moved = registry.promote("acme/sql:1.0.0", "prod", reason="first")
    assert isinstance(moved, Move)
    assert (moved.from_version, moved.to_version, moved.reason) == (None, "1.0.0", "first")
    registry.promote("acme/sql:1.1.0", "prod")
    assert registry.rollback("acme/sql@prod", reason="worse").to_version == "1.0.0"
    assert [(move.kind, move.to_version) for move in registry.history("acme/sql@prod")] == [
        ("rollback", "1.0.0"), ("promote", "1.1.0"), ("promote", "1.0.0"),
    ]  # fmt: skip
    assert registry.resolve("acme/sql@prod").version == "1.0.0"
    cli.ok("gate", "acme/sql@prod", "--rule", "sql-exact.accuracy>=0.5")
    with pytest.raises(Refused) as refused:
        registry.promote("acme/sql:1.1.0", "prod")
    assert refused.value.code == "gate_failed"
    assert "sql-exact.accuracy >= 0.5" in refused.value.findings[0]["rule"]

    policy = directory / "policy.yaml"
    policy.write_text("version: 1\nrules: [sql-exact.nll <= 99]\nmissing: evaluate\n")
    cli.ok("policy", "set", "acme/sql@next", policy)
    waiting = registry.promote("acme/sql:1.1.0", "next", wait=False)
    assert isinstance(waiting, Promotion)
    assert waiting.state == "pending"
    assert waiting.missing[0].startswith("sql-exact.nll <= 99: ")
    completed = registry.promote("acme/sql:1.1.0", "next")
    assert isinstance(completed, Move)
    assert completed.to_version == "1.1.0"
    assert {score.metric for score in registry.resolve("acme/sql@next").scores} == {"nll", "accuracy"}


def combinations(registry: Registry, world: World) -> None:
    """Two adapters are compared, and combined into one."""
    pair = ("acme/sql:1.0.0", "acme/terraform:1.0.0")
    assert registry.conflicts(*pair, weights=[1.0, 0.5]).verdict == "unmeasured"
    suites = ["sql-exact", "terraform-exact"]
    probed = registry.conflicts(*pair, suites=suites, guards=["guard-exact"], probe=2, probe_max=2, device="cpu")
    assert probed.to_json()["pairs"][0]["evidence"] == "probe"
    directories = registry.conflicts(
        *(world.adapters[name] for name in ("sql", "terraform")), prompts=["a"], base="tiny"
    )
    assert directories.to_json()["activations"]["prompts"] == 1
    for wrong in (lambda: registry.conflicts(pair[0]), lambda: registry.conflicts(*pair, weights=[1.0])):
        with pytest.raises(Usage):
            wrong()
    recipe = {
        "inputs": [{"adapter": ref} for ref in pair],
        "method": "stack",
        "adapter": "acme/both:1.0.0",
        "probe": 0,
        "gates": [],
    }
    planned = registry.compose(recipe, plan=True)
    assert (planned.verdict, planned.published) == ("unmeasured", ())
    assert registry.compose(recipe).published == ("acme/both:1.0.0",)
    failing = {"evaluate": ["sql-exact"], "gates": ["sql-exact.nll <= 0"]}
    with pytest.raises(Refused):
        registry.compose({**recipe, "adapter": "acme/other:1.0.0", **failing})


def fenced(page: str, heading: str = "") -> str:
    """The Python of a page, or below one heading of it, as one program."""
    text = (DOCS / "how-to" / page).read_text()
    part = text.split(f"\n## {heading}\n")[1].split("\n## ")[0] if heading else text
    return "\n".join(re.findall(r"```python\n(.*?)```", part, re.DOTALL))


def of_docstrings() -> Iterator[tuple[str, str]]:
    """The examples in the docstrings of the package's exports, each as a program."""
    for name in ("Registry", "AdaptoryCallback"):
        exported = getattr(sdk, name)
        for described in (exported, *filter(inspect.isfunction, vars(exported).values())):
            if examples := DocTestParser().get_examples(inspect.getdoc(described) or ""):
                yield described.__qualname__, "".join(example.source for example in examples)


@pytest.fixture
def desk(
    stocked_embedded: Cli, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Generator[dict[str, Any]]:
    """The files and names that the examples have before them, and where they run."""
    monkeypatch.chdir(tmp_path)
    stocked_embedded.ok("base", "add", world.base, "--name", "tiny", "--alias", "smollm2")
    shutil.copytree(world.adapters["other-sql"], "out")
    Path("base").symlink_to(world.base)
    for name in ("sql", "terraform"):
        stocked_embedded.ok("push", world.adapters[name], f"acme/{name}:1.0.0", "--base", "tiny", "--channel", "prod")
    inputs = [{"adapter": f"acme/{name}@prod"} for name in ("sql", "terraform")]
    recipe = {"inputs": inputs, "method": "stack", "adapter": "acme/assistant:1.0.0", "probe": 0, "gates": []}
    Path("assistant.yaml").write_text(yaml.safe_dump(recipe))
    examples = [{"prompt": f"sql {number}", "completion": str(number)} for number in range(32)]
    Path("suite.yaml").write_text(
        yaml.safe_dump({"name": "sql-exact", "kind": "target", "chat": False, "examples": examples})
    )
    stocked_embedded.ok("suite", "add", "suite.yaml")
    rows = Dataset.from_list([{"prompt": f"select {number}", "completion": " from t"} for number in range(4)])
    with environment(stocked_embedded.environment, []):
        yield {"train": rows, "held_out": rows, "args": SFTConfig("trained", max_steps=1, use_cpu=True)}


def test_the_pages_about_python_run_as_one_program(desk: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    program = fenced("python.md") + fenced("train.md", "TRL and transformers' Trainer")
    exec(compile(program, "python.md", "exec"), desk)  # noqa: S102 - our own file
    assert "acme/support:0.1.0" in capsys.readouterr().out


def test_every_example_of_a_docstring_runs(desk: dict[str, Any]) -> None:
    examples = dict(of_docstrings())
    methods = {
        f"Registry.{name}" for name, member in vars(Registry).items() if inspect.isfunction(member) and name[0] != "_"
    }
    assert methods - {"Registry.close"} <= examples.keys()
    assert "AdaptoryCallback" in examples
    with Registry() as registry:
        for where, code in examples.items():
            names = {**{name: getattr(sdk, name) for name in sdk.__all__}, **desk, "registry": registry}
            exec(compile(code, where, "exec"), names)  # noqa: S102 - our own text
