"""The promise of a version: a change that breaks users of a range is refused, or gets a number that shows it."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from sqlalchemy import update

from registry.client.push import collect, push
from registry.client.selection import select_files
from registry.database.tables import Release
from registry.errors import Refused
from registry.formats.references import parse_repository
from tests.composer.handmade import random_factors, write_adapter
from tests.scenarios.traces import api_of, opened
from tests.scenarios.world import Cli, Ran, World

Q0, Q1, V0 = (f"model.layers.{layer}.self_attn.{name}_proj" for layer, name in ((0, "q"), (1, "q"), (0, "v")))


def adapter(directory: Path, rank: int = 2, modules: tuple[str, ...] = (Q0,), seed: int = 0, **config: object) -> Path:
    """An adapter for the tiny llama: queries are 32 x 32, values 16 x 32."""
    factors = {module: random_factors(seed, 16 if module == V0 else 32, 32, rank) for module in modules}
    write_adapter(directory, factors, dtype=torch.float32, **config)
    return directory


def release(cli: Cli, directory: Path, target: str, *options: object) -> Ran:
    return cli("push", directory, target, "--base", "tiny", *options)


def version_of(ran: Ran) -> str:
    assert ran.code == 0, ran.err
    return ran.out.split()[1].partition(":")[2]


def test_a_breaking_change_is_refused_with_its_reasons_and_the_number_that_would_be_right(
    stocked: Cli, world: World
) -> None:
    stocked.ok("push", world.adapters["sql"], "acme/sql:1.2.0", "--base", "tiny")
    refused = stocked("push", world.adapters["terraform"], "acme/sql:1.3.0", "--base", "tiny", "--json")
    assert refused.code == 1
    error = refused.json["error"]
    assert (error["code"], error["subject"]) == ("breaking_change", "acme/sql:1.3.0")
    assert {finding["code"] for finding in error["findings"]} == {"other_type", "more_targets"}
    assert "o_proj" in error["detail"]
    assert "2.0.0" in error["next"]
    assert len(stocked.json("log", "acme/sql")["items"]) == 1
    stocked.ok("push", world.adapters["terraform"], "acme/sql:2.0.0", "--base", "tiny")


@pytest.mark.long
def test_a_line_at_the_largest_number_is_not_bumped_beyond_what_can_be_asked_for(stocked: Cli, world: World) -> None:
    last = "acme/sql:999999999999999999.0.0"
    stocked.ok("push", world.adapters["sql"], last, "--base", "tiny")
    for bump, name in (("major", "other-sql"), ("auto", "terraform")):
        refused = stocked("push", world.adapters[name], "acme/sql", "--bump", bump, "--base", "tiny")
        assert refused.code == 2, refused.err
        assert "No major version follows 999999999999999999.0.0" in refused.err
        assert "next: Choose a version yourself" in refused.err
    stocked.ok("push", world.adapters["other-sql"], "acme/sql", "--bump", "minor", "--base", "tiny")
    stocked.ok("show", "acme/sql:999999999999999999.1.0")
    stocked.ok("yank", last, "--reason", "a number by mistake")
    stocked.ok("promote", "acme/sql", "--to", "prod")


def test_a_version_that_nobody_can_ask_for_is_reported_by_fsck(stocked_embedded: Cli, world: World) -> None:
    cli = stocked_embedded
    cli.ok("push", world.adapters["sql"], "acme/sql:999999999999999999.0.0", "--base", "tiny")
    cli.ok("fsck")
    held = opened(cli)
    with held.write() as session:
        session.execute(update(Release).values(version="1000000000000000000.0.0"))
    held.close()
    ran = cli("fsck", "--json")
    subjects = {finding["code"]: finding["subject"] for finding in ran.json["findings"]}
    assert (ran.code, subjects["version_unreadable"]) == (1, "acme/sql:1000000000000000000.0.0")


def test_auto_counts_up_what_the_change_needs(stocked: Cli, world: World, tmp_path: Path) -> None:
    def push_auto(directory: Path) -> str:
        published = stocked.json("push", directory, "acme/sql", "--bump", "auto", "--base", "tiny")["release"]
        return published["version"]

    stocked.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny")
    assert push_auto(world.adapters["other-sql"]) == "1.1.0"
    documented = tmp_path / "documented"
    shutil.copytree(world.adapters["other-sql"], documented)
    (documented / "README.md").write_text("better words")
    assert push_auto(documented) == "1.1.1"
    assert push_auto(documented) == "1.1.1", "nothing has changed since"
    assert push_auto(world.adapters["terraform"]) == "2.0.0"


REASONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "larger_rank": ({"rank": 2}, {"rank": 4}),
    "more_targets": ({"modules": (Q0,)}, {"modules": (Q0, V0)}),
    "other_type": ({}, {"use_rslora": True}),
}


@pytest.mark.parametrize("reason", REASONS)
def test_each_reason_breaks_one_way_and_not_the_other(
    reason: str, stocked_embedded: Cli, world: World, tmp_path: Path
) -> None:
    small, large = (
        adapter(tmp_path / name, **kind) for name, kind in zip(("small", "large"), REASONS[reason], strict=True)
    )
    assert release(stocked_embedded, small, "acme/up:1.0.0").code == 0
    refused = release(stocked_embedded, large, "acme/up", "--bump", "minor", "--json")
    assert (refused.code, [finding["code"] for finding in refused.json["error"]["findings"]]) == (1, [reason])
    assert release(stocked_embedded, large, "acme/down:1.0.0").code == 0
    back = release(stocked_embedded, small, "acme/down", "--bump", "minor")
    assert back.code == (1 if reason == "other_type" else 0)


def test_the_same_targets_in_more_layers_break_nobody(stocked_embedded: Cli, tmp_path: Path) -> None:
    assert release(stocked_embedded, adapter(tmp_path / "one"), "acme/sql:1.0.0").code == 0
    assert release(stocked_embedded, adapter(tmp_path / "two", modules=(Q0, Q1)), "acme/sql:1.0.1").code == 0


def test_in_0_x_a_minor_number_is_enough_and_needed(stocked_embedded: Cli, tmp_path: Path) -> None:
    cli, large = stocked_embedded, adapter(tmp_path / "large", rank=4)
    assert version_of(release(cli, adapter(tmp_path / "small"), "acme/sql", "--bump", "auto")) == "0.1.0"
    assert version_of(release(cli, adapter(tmp_path / "other", seed=1), "acme/sql", "--bump", "auto")) == "0.1.1"
    refused = release(cli, large, "acme/sql", "--bump", "patch")
    assert refused.code == 1
    assert "0.2.0" in refused.err
    assert version_of(release(cli, large, "acme/sql", "--bump", "auto")) == "0.2.0"


def test_what_was_a_prerelease_gets_the_number_that_it_led_to(stocked_embedded: Cli, tmp_path: Path) -> None:
    cli, large = stocked_embedded, adapter(tmp_path / "large", rank=4)
    assert release(cli, adapter(tmp_path / "small"), "acme/sql:1.0.0").code == 0
    assert release(cli, large, "acme/sql:2.0.0-rc.1").code == 0
    for is_new in (True, False):
        pushed = release(cli, large, "acme/sql", "--bump", "auto", "--json").json
        assert (pushed["release"]["version"], pushed["created"]) == ("2.0.0", is_new)


def test_a_prerelease_is_judged_like_the_release_it_leads_to(stocked_embedded: Cli, tmp_path: Path) -> None:
    cli, large = stocked_embedded, adapter(tmp_path / "large", rank=4)
    assert release(cli, adapter(tmp_path / "small"), "acme/sql:1.0.0").code == 0
    assert release(cli, large, "acme/sql:1.1.0-rc.1").code == 1
    assert release(cli, large, "acme/sql:2.0.0-rc.1").code == 0
    middle = adapter(tmp_path / "middle", rank=3)
    assert release(cli, middle, "acme/sql:1.1.0").code == 1, "a pre-release is nobody's yardstick"
    assert release(cli, large, "acme/sql:2.0.0").code == 0


def test_a_yanked_release_is_no_yardstick_but_its_number_is_taken(stocked_embedded: Cli, tmp_path: Path) -> None:
    cli, small = stocked_embedded, adapter(tmp_path / "small", rank=2)
    assert release(cli, adapter(tmp_path / "large", rank=4), "acme/sql:1.0.0").code == 0
    assert release(cli, small, "acme/sql:1.1.0").code == 0
    cli.ok("yank", "acme/sql:1.1.0", "--reason", "the wrong run")
    again = adapter(tmp_path / "again", rank=4, seed=1)
    assert version_of(release(cli, again, "acme/sql", "--bump", "auto")) == "1.2.0"


def test_a_fix_of_an_older_line_is_compared_with_that_line(stocked_embedded: Cli, tmp_path: Path) -> None:
    cli, large = stocked_embedded, adapter(tmp_path / "large", rank=4)
    assert release(cli, adapter(tmp_path / "small"), "acme/sql:1.0.0").code == 0
    assert release(cli, large, "acme/sql:2.0.0").code == 0
    assert release(cli, adapter(tmp_path / "fix", seed=1), "acme/sql:1.0.1").code == 0
    refused = release(cli, large, "acme/sql:1.0.2")
    assert refused.code == 1
    assert "already published as 2.0.0" in refused.err
    again = release(cli, large, "acme/sql", "--bump", "auto", "--json").json
    assert (again["release"]["version"], again["created"]) == ("2.0.0", False)


def test_files_of_an_older_release_get_a_number_of_their_own_and_move_no_channel_back(
    stocked_embedded: Cli, tmp_path: Path
) -> None:
    cli, first = stocked_embedded, adapter(tmp_path / "first")
    assert release(cli, first, "acme/sql:1.0.0").code == 0
    assert release(cli, adapter(tmp_path / "second", seed=1), "acme/sql:1.1.0", "--channel", "prod").code == 0
    again = ("acme/sql", "--bump", "auto", "--notes", "back to the first run", "--channel", "prod", "--json")
    published = release(cli, first, *again).json
    assert (published["created"], published["release"]["version"], published["release"]["notes"]) == (
        True,
        "1.2.0",
        again[4],
    )
    assert (published["move"]["from_version"], published["move"]["to_version"]) == ("1.1.0", "1.2.0")
    retried = release(cli, first, *again).json
    assert (retried["created"], retried["release"]["version"]) == (False, "1.2.0")


def test_files_of_a_yanked_release_are_published_anew(stocked_embedded: Cli, tmp_path: Path) -> None:
    cli, large = stocked_embedded, adapter(tmp_path / "large", rank=4)
    assert release(cli, adapter(tmp_path / "small"), "acme/sql:1.0.0").code == 0
    assert release(cli, large, "acme/sql:2.0.0").code == 0
    cli.ok("yank", "acme/sql:2.0.0", "--reason", "too early")
    refused = release(cli, large, "acme/sql:1.0.1")
    assert (refused.code, "Publish it as 3.0.0, which --bump auto finds" in refused.err) == (1, True), refused.err
    assert version_of(release(cli, large, "acme/sql", "--bump", "auto")) == "3.0.0"


def test_a_refused_release_learns_the_number_that_auto_gives_it(stocked_embedded: Cli, tmp_path: Path) -> None:
    cli = stocked_embedded
    for version, rank in (("1.0.0", 2), ("3.0.0", 4)):
        assert release(cli, adapter(tmp_path / version, rank), f"acme/sql:{version}").code == 0
    for rank, right in ((3, "3.1.0"), (8, "4.0.0")):
        directory = adapter(tmp_path / str(rank), rank, seed=rank)
        refused = release(cli, directory, "acme/sql:1.1.0")
        assert (refused.code, f"Publish it as {right}, which --bump auto finds" in refused.err) == (1, True), (
            refused.err
        )
        assert version_of(release(cli, directory, "acme/sql", "--bump", "auto")) == right


def test_a_breaking_change_goes_through_with_a_reason_that_is_kept_shown_and_audited(
    stocked: Cli, world: World
) -> None:
    cli, reason = stocked, "nobody follows it yet"
    cli.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny")
    push_it = ("push", world.adapters["terraform"], "acme/sql:1.0.1", "--base", "tiny")
    assert cli(*push_it, "--allow-breaking", "  ").code == 1
    allowed = cli.json(*push_it, "--allow-breaking", reason)["release"]
    assert allowed["breaking_reason"] == reason
    assert cli.json("show", "acme/sql:1.0.1")["breaking_reason"] == reason
    assert reason in cli.ok("show", "acme/sql:1.0.1").out
    (event,) = cli.json("audit", "--subject", "acme/sql:1.0.1")["items"]
    assert (event["act"], event["reason"]) == ("release:publish", reason)
    assert not cli.json(*push_it)["created"], "a retry needs no reason"


def test_a_reason_that_was_not_needed_is_not_kept(stocked_embedded: Cli, tmp_path: Path) -> None:
    one, other = adapter(tmp_path / "one"), adapter(tmp_path / "other", seed=1)
    assert release(stocked_embedded, one, "acme/sql:1.0.0", "--allow-breaking", "why not").code == 0
    assert release(stocked_embedded, other, "acme/sql:1.0.1", "--allow-breaking", "why not").code == 0
    assert [row["breaking_reason"] for row in stocked_embedded.json("log", "acme/sql")["items"]] == [None, None]


@pytest.mark.long
def test_a_composition_is_judged_like_any_other_release(stocked_embedded: Cli, world: World, tmp_path: Path) -> None:
    cli, recipe = stocked_embedded, tmp_path / "recipe.yaml"
    for name in ("sql", "support"):
        cli.ok("push", world.adapters[name], f"acme/{name}:1.0.0", "--base", "tiny")
    cli.ok("push", world.adapters["sql"], "acme/both:1.0.0", "--base", "tiny")
    inputs = [{"adapter": "acme/sql"}, {"adapter": "acme/support"}]
    recipe.write_text(yaml.safe_dump({"inputs": inputs, "method": "stack", "adapter": "acme/both:1.1.0", "probe": 0}))
    refused = cli("compose", recipe)
    assert refused.code == 1
    assert "Its largest rank is 8, not 4" in refused.err
    assert [row["version"] for row in cli.json("log", "acme/both")["items"]] == ["1.0.0"]
    recipe.write_text(recipe.read_text().replace("both:1.1.0", "both:2.0.0"))
    cli.ok("compose", recipe)
    composed = cli.json("show", "acme/both:2.0.0")
    assert composed["servers"], "what a composition made is judged for servers too"
    assert composed["adapter"]["spectrum"]["rank_95"] > 0


def test_a_merged_model_of_another_base_breaks_too(stocked_embedded: Cli, world: World, tmp_path: Path) -> None:
    cli, other = stocked_embedded, tmp_path / "other-base"
    shutil.copytree(world.base, other)
    shard = min(other.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-4:] = np.float32(0.125).tobytes()
    shard.write_bytes(content)
    cli.ok("base", "add", other, "--name", "other")
    with api_of(cli) as api:

        def publish(base: str, directory: Path, **number: str) -> dict[str, Any]:
            files, name = collect(select_files(directory, "model")), parse_repository("acme/merged")
            return dict(
                push(api, files, name, "model", {"base": base, **number}, lambda _count: None)[0].release.document
            )

        assert publish("tiny", world.base, version="1.0.0")["version"] == "1.0.0"
        with pytest.raises(Refused, match="Its base is"):
            publish("other", other, version="1.1.0")
        assert publish("other", other, bump="auto")["version"] == "2.0.0"
