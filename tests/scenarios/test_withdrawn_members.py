"""A member of a set that is yanked or taken down, and sets where only one adapter or one model will do."""

import json
from pathlib import Path

import pytest
import yaml

from tests.registry.api.test_pages import single_user
from tests.scenarios.test_crashes import resources_of
from tests.scenarios.world import Cli

SET = "acme/assistants:1.0.0"


@pytest.fixture
def with_set(small_team: Cli, tmp_path: Path) -> Cli:
    """A team with a set of acme/sql and acme/support, served by prod."""
    publish(small_team, SET, tmp_path)
    small_team.ok("promote", SET, "--to", "prod", "--new-channel")
    return small_team


def publish(cli: Cli, name: str, directory: Path, *members: str) -> None:
    rows = [
        {"adapter": f"acme/{member}", "prompts": [f"{member} {n}" for n in range(5)]}
        for member in members or ("sql", "support")
    ]
    recipe = directory / "set.yaml"
    recipe.write_text(yaml.safe_dump({"inputs": rows, "set": name, "gates": []}))
    cli.ok("compose", recipe, "--follow")


def page(cli: Cli, path: str) -> str:
    with resources_of(cli.environment) as resources, single_user(resources) as http:
        return http.get(path).text


@pytest.mark.on("PostgreSQL")
def test_before_a_member_is_withdrawn_the_sets_that_serve_it_are_named(with_set: Cli) -> None:
    assert (
        f"{SET}, served by prod, has it as a member"
        in with_set.ok("yank", "acme/sql:1.0.0", "--dry-run", "--reason", "x").err
    )
    shown = with_set.ok("takedown", "acme/sql:1.0.0", "--dry-run", "--reason", "x")
    assert f"{SET}, served by prod, would lose a member" in shown.err
    assert "could not be published here again" in shown.out
    assert f"{SET} has it as a member and goes on serving it: prod would not change" in page(
        with_set, "/acme/sql/1.0.0/yank"
    )
    document = json.loads(with_set.ok("yank", "acme/sql:1.0.0", "--reason", "wrong", "--json").out)
    assert document["sets"] == [{"release": SET, "channels": ["prod"]}]


def test_a_set_says_everywhere_that_a_member_is_withdrawn_and_is_promoted_no_more(with_set: Cli) -> None:
    with_set.ok("yank", "acme/sql:1.0.0", "--reason", "wrong")
    assert "acme/sql:1.0.0 is yanked: wrong" in with_set.ok("show", SET).out
    assert "It serves acme/sql:1.0.0, which is yanked." in with_set.ok("pull", SET).err
    shown = page(with_set, "/acme/assistants/1.0.0")
    assert "acme/sql 1.0.0, which it serves, is yanked: wrong" in shown
    refused = with_set("promote", SET, "--to", "next", "--new-channel")
    assert (refused.code, "acme/sql:1.0.0, which is yanked" in refused.err) == (1, True)
    with_set.ok("unyank", "acme/sql:1.0.0", "--reason", "right")
    with_set.ok("promote", SET, "--to", "next", "--new-channel")
    with_set.ok("takedown", "acme/sql:1.0.0", "--reason", "not ours")
    assert "acme/sql:1.0.0 was taken down" in with_set.ok("show", SET).out
    assert "It serves acme/sql:1.0.0, which was taken down." in with_set.ok("pull", SET).err
    assert "which it serves, was taken down" in page(with_set, "/acme/assistants/1.0.0")


def test_a_rollback_returns_to_no_set_with_a_withdrawn_member(with_set: Cli, tmp_path: Path) -> None:
    """As to no yanked release."""
    publish(with_set, "acme/assistants:1.1.0", tmp_path)
    with_set.ok("promote", "acme/assistants:1.1.0", "--to", "prod")
    with_set.ok("yank", "acme/sql:1.0.0", "--reason", "wrong")
    refused = with_set("rollback", "acme/assistants@prod", "--to", "1.0.0")
    assert refused.code == 1
    assert f"{SET} cannot be served again. It serves acme/sql:1.0.0, which is yanked." in refused.err
    refused = with_set("rollback", "acme/assistants@prod")
    assert (refused.code, "has no earlier release to return to" in refused.err) == (1, True)
    with_set.ok("unyank", "acme/sql:1.0.0", "--reason", "right")
    with_set.ok("rollback", "acme/assistants@prod")
    assert json.loads(with_set.ok("show", "acme/assistants@prod", "--json").out)["version"] == "1.0.0"


def served(cli: Cli) -> str | None:
    """The version that prod serves: as its followers see it, as it resolves, and as fsck computes it again."""
    name = "acme/assistants@prod"
    version = json.loads(page(cli, f"/v1/follow?channels={name}"))["channels"][name]["version"]
    resolved = cli("show", name, "--json")
    assert version == (json.loads(resolved.out)["version"] if resolved.code == 0 else None)
    cli.ok("fsck")
    return version


def test_a_yank_falls_back_to_no_set_with_a_withdrawn_member(with_set: Cli, tmp_path: Path) -> None:
    """But a set that a channel has fallen back to stays: withdrawn members change no channel."""
    for version, members in (("2.0.0", ("terraform", "support")), ("3.0.0", ())):
        publish(with_set, f"acme/assistants:{version}", tmp_path, *members)
        with_set.ok("promote", f"acme/assistants:{version}", "--to", "prod")
    with_set.ok("yank", "acme/assistants:3.0.0", "--reason", "wrong")
    for member in ("terraform", "sql"):
        with_set.ok("yank", f"acme/{member}:1.0.0", "--reason", "wrong")
        assert served(with_set) == "2.0.0"
    with_set.ok("yank", "acme/assistants:2.0.0", "--reason", "wrong")
    assert served(with_set) is None
    with_set.ok("unyank", "acme/sql:1.0.0", "--reason", "right")
    with_set.ok("yank", "acme/assistants:2.0.0", "--reason", "still wrong")
    assert served(with_set) is None
    with_set.ok("unyank", "acme/assistants:2.0.0", "--reason", "right")
    assert served(with_set) == "1.0.0"


def test_a_set_is_refused_as_an_input_with_its_kind_and_is_not_exported(with_set: Cli, tmp_path: Path) -> None:
    recipe = tmp_path / "nested.yaml"
    row = {"adapter": SET, "prompts": ["a", "b", "c"]}
    recipe.write_text(yaml.safe_dump({"inputs": [row], "set": "acme/nested:1.0.0", "gates": []}))
    assert "acme/assistants holds set releases, not adapter releases" in with_set("compose", recipe).err
    refused = with_set("export", SET, "hf://acme/exported", "--endpoint", "http://127.0.0.1:9")
    assert (refused.code, "is a set, whose members are releases of this registry" in refused.err) == (2, True)
