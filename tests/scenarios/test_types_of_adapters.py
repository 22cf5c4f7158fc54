"""Adapters other than plain LoRA are released, found and merged like any other, and described correctly."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file

from tests.composer.adapted import logits, peft_logits, relative, save_adapted
from tests.composer.export.test_convert import as_kohya
from tests.scenarios.world import Cli, World

QV: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
KINDS: dict[str, tuple[peft.PeftConfig, str, int]] = {
    "dora": (peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, **QV), "dora", 4),
    "tokens": (peft.LoraConfig(r=4, trainable_token_indices=[3, 5], **QV), "trainable_token_indices", 4),
    "loha": (peft.LoHaConfig(r=2, **QV), "loha", 2),
    "ia3": (peft.IA3Config(feedforward_modules=[], **QV), "ia3", 0),
    "vera": (peft.VeraConfig(r=4, **QV), "vera", 4),
    "oft": (peft.OFTConfig(oft_block_size=4, **QV), "oft", 0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_pushed_shown_found_and_merged(kind: str, embedded: Cli, world: World, tmp_path: Path) -> None:
    config, variant, rank = KINDS[kind]
    adapter = save_adapted(world.base, config, tmp_path / kind)
    embedded.ok("base", "add", world.base, "--name", "small")
    inspected = embedded.json("inspect", adapter)
    assert inspected["adapter"]["variant"] == variant
    embedded.ok("push", adapter, f"acme/{kind}:1.0.0", "--base", "small")
    shown = embedded.json("show", f"acme/{kind}:1.0.0")["adapter"]
    assert (shown["variant"], shown["rank_max"]) == (variant, rank)
    assert {"q_proj", "v_proj"} <= set(shown["targets"])
    assert embedded.json("search", "--loads-in", "vllm:512")["items"] == []
    assert [release["repository"] for release in embedded.json("search", "--loads-in", "peft")["items"]] == [
        f"acme/{kind}"
    ]
    embedded.ok("merge", "--base", world.base, "--adapter", adapter, "-o", tmp_path / "merged")
    assert relative(logits(tmp_path / "merged"), peft_logits(world.base, adapter)) <= 1e-5


def test_another_layout_is_looked_at_converted_and_elsewhere_named(embedded: Cli, world: World, tmp_path: Path) -> None:
    kohya, base = tmp_path / "kohya", world.base
    kohya.mkdir()
    as_kohya(world.adapters["sql"], kohya)  # rank 4, alpha 8
    embedded.ok("base", "add", base, "--name", "small")
    for options in ((), ("--base", "small")):
        report = embedded.json("inspect", kohya, *options)
        facts = report["adapter"]
        assert (report["layout"], facts["type"], facts["rank_max"], facts["alpha"]) == ("kohya", "lora", 4, 8.0)
        assert {row["loads"] for row in report["loads_in"]} == {False}
    assert "`adaptory convert` converts it to PEFT's" in embedded.ok("inspect", kohya).out
    commands: list[tuple[object, ...]] = [
        ("merge", "--base", base, "--adapter", kohya, "-o", tmp_path / "out"),
        ("combine", "--base", base, "--adapter", kohya, "-o", tmp_path / "out"),
        ("conflicts", kohya, world.adapters["support"], "--base", base),
        ("push", kohya, "acme/kohya:1.0.0", "--base", "small"),
        ("diff", kohya, world.adapters["sql"]),
    ]
    for command in commands:
        ran = embedded(*command)
        assert (ran.code, "kohya is an adapter in the layout of kohya" in ran.err) == (6, True), (command, ran)
        assert "next: Convert it: `adaptory convert" in ran.err
    embedded.ok("convert", kohya, "--base", base, "-o", tmp_path / "converted")
    assert embedded.json("inspect", tmp_path / "converted")["layout"] == "peft"
    embedded.ok("push", tmp_path / "converted", "acme/kohya:1.0.0", "--base", "small")


def test_a_look_at_what_cannot_be_converted_is_the_refusal(on_disk: Cli, tmp_path: Path) -> None:
    save_file({"lora_te_q_proj.dora_scale": torch.ones(4, 1)}, tmp_path / "a.safetensors")
    ran = on_disk("inspect", tmp_path / "a.safetensors")
    assert (ran.code, "trainers disagree" in ran.err, "next: " in ran.err) == (1, True, True)


def test_a_conflict_report_of_unlike_types_says_what_it_cannot_compare(
    on_disk: Cli, world: World, tmp_path: Path
) -> None:
    loha = save_adapted(world.base, KINDS["loha"][0], tmp_path / "loha")
    report = on_disk.json("conflicts", loha, world.adapters["sql"], "--base", world.base)
    assert report["verdict"] in ("unmeasured", "warn")


def test_two_adapters_that_rescale_one_weight_need_a_stated_order(on_disk: Cli, world: World, tmp_path: Path) -> None:
    dora, oft = (save_adapted(world.base, KINDS[kind][0], tmp_path / kind) for kind in ("dora", "oft"))
    merge = ("merge", "--base", world.base, "--adapter", dora, "--adapter", oft, "-o", tmp_path / "merged")
    ran = on_disk(*merge)
    assert ran.code != 0
    assert "each rescale" in ran.err
    assert "--sequential" in ran.err
    assert not (tmp_path / "merged").exists()
    on_disk.ok(*merge, "--sequential")
    assert json.loads((tmp_path / "merged" / "adaptory.json").read_text())["settings"]["sequential"] is True


def test_a_change_of_type_needs_a_major_bump(embedded: Cli, world: World, tmp_path: Path) -> None:
    embedded.ok("base", "add", world.base, "--name", "small")
    loha = save_adapted(world.base, KINDS["loha"][0], tmp_path / "loha")
    embedded.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "small")
    assert embedded("push", loha, "acme/sql:1.1.0", "--base", "small").code != 0
    embedded.ok("push", loha, "acme/sql:2.0.0", "--base", "small")
    changed = embedded.json("diff", "acme/sql:1.0.0", "acme/sql:2.0.0")
    assert "loha" in str(changed)
