"""A user looks up the inputs of a composition: before it is made, of a release, and compared with another one."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from composer.formats.recipes.weights import parse_rule
from registry.client.lineage import of_release
from registry.formats.lineage import NOTE_FILE, of_note, rule_words, side_by_side
from registry.wire.catalog import ReleaseOut
from tests.scenarios import stored
from tests.scenarios.world import Cli, World

HOW = "dare_ties_svd: rank 4, density 0.6, seed 3, vote plain, divide count"
RULED = "0.8 (0.3 in layer 0 of q_proj, 0 in v_proj)"


def recipe(path: Path, version: str, weight: float = 1.0, **changes: Any) -> Path:
    rules = [{"layers": "0", "modules": "q_proj", "weight": 0.3}, {"modules": "v_proj", "weight": 0}]
    content = {
        "inputs": [
            {"adapter": "acme/sql:1.0.0", "weight": 0.8, "rules": rules},
            {"adapter": "acme/terraform:1.0.0", "weight": weight},
        ],
        "method": "dare_ties_svd",
        "settings": {"density": 0.6, "seed": 3, "rank": 4},
        "adapter": f"acme/both:{version}",
        "model": f"acme/merged:{version}",
        "rounding": "stochastic",
        "probe": 0,
    }
    path.write_text(yaml.safe_dump(content | changes))
    return path


@pytest.mark.long
def test_plan_show_and_diff_tell_rules_method_and_settings(team: Cli, tmp_path: Path) -> None:
    first = recipe(tmp_path / "recipe.yaml", "1.0.0")
    planned = team.ok("compose", first, "--plan", "--wide").out
    assert f"method {HOW}" in planned
    assert "rounding stochastic, seed 0" in planned
    assert "0.3 in layer 0 of q_proj, 0 in v_proj" in planned

    team.ok("compose", first)
    for name in ("both", "merged"):
        shown = team.ok("show", f"acme/{name}:1.0.0", "--wide").out
        assert f"{RULED} x acme/sql:1.0.0" in shown
        assert HOW in shown
        assert ("stochastic, seed 0" in shown) is (name == "merged")
    assert "method" not in team.ok("show", "acme/sql").out

    team.ok("compose", recipe(tmp_path / "recipe.yaml", "1.1.0", 0.5, method="svd", settings={"rank": 4}))
    for name in ("both", "merged"):
        rows = team.json("diff", f"acme/{name}:1.0.0", f"acme/{name}:1.1.0")["composition"]
        changes = {row["name"]: (row["old"], row["new"]) for row in rows}
        assert changes["method"] == ("dare_ties_svd", "svd")
        assert changes["settings.density"] == (0.6, None)
        assert changes["settings.rank"] == (4, 4)
        old, new = changes["member acme/terraform"]
        assert old.startswith("1 x 1.0.0 ")
        assert new.startswith("0.5 x 1.0.0 ")
    assert "member acme/terraform" in team.ok("diff", "acme/both:1.0.0", "acme/both:1.1.0").out
    rows = team.json("diff", "acme/sql", "acme/both")["composition"]
    assert {row["old"] for row in rows} == {None}, "one side is enough"
    assert team.json("diff", "acme/sql", "acme/terraform")["composition"] == []


@pytest.mark.long
def test_members_are_listed_in_the_recipes_order_with_its_method_whatever_was_published_first(
    team: Cli, tmp_path: Path
) -> None:
    turned = yaml.safe_load(recipe(tmp_path / "recipe.yaml", "1.0.0").read_text())["inputs"][::-1]
    team.ok("compose", recipe(tmp_path / "recipe.yaml", "1.0.0", inputs=turned))
    team.ok("compose", recipe(tmp_path / "recipe.yaml", "1.1.0"))
    shown = team.ok("show", "acme/both:1.0.0", "--wide").out
    assert HOW in shown
    assert -1 < shown.index("1 x acme/terraform:1.0.0") < shown.index(f"{RULED} x acme/sql:1.0.0")
    rows = team.json("diff", "acme/both:1.0.0", "acme/both:1.1.0")["composition"]
    assert [row for row in rows if row["old"] != row["new"]] == []


def test_the_directory_of_a_local_combination_says_what_it_was_combined_from(
    embedded: Cli, world: World, tmp_path: Path
) -> None:
    pair = ["--adapter", world.adapters["sql"], "--adapter", f"{world.adapters['terraform']}=0.5"]
    combined = embedded.ok("combine", *pair, "-o", tmp_path / "both").out
    assert "rank 6 in 2 modules, 4 in 2, 2 in 2" in combined
    assert embedded.json("combine", *pair, "-o", tmp_path / "again")["ranks"] == {"6": 2, "4": 2, "2": 2}
    rows = embedded.json("diff", world.adapters["sql"], tmp_path / "both")["composition"]
    assert [(row["name"], row["old"]) for row in rows] == [
        ("method", None), ("member sql", None), ("member terraform", None),
    ]  # fmt: skip
    assert [row["new"][:4] for row in rows] == ["stac", "1 x ", "0.5 "]


def test_a_member_that_may_not_be_seen_stays_hidden_and_another_note_is_not_believed(team: Cli, tmp_path: Path) -> None:
    team.ok("compose", recipe(tmp_path / "recipe.yaml", "1.0.0"))
    team.ok("pull", "acme/both:1.0.0", "-o", tmp_path / "both")
    note, release = (tmp_path / "both" / NOTE_FILE).read_bytes(), team.json("show", "acme/both:1.0.0")
    release["inputs"][0] |= {"repository": None, "version": None}
    made = of_release(ReleaseOut.read(release), note)
    assert made is not None
    assert str(made.members[0]).startswith(f"{RULED} x a release without access ")
    assert made.method == "dare_ties_svd"
    release["inputs"][1]["weight"] = 7.0
    made = of_release(ReleaseOut.read(release), note)
    assert made is not None
    assert (made.method, [member.weight.value for member in made.members]) == ("", [0.8, 7.0])


def test_a_release_whose_note_the_store_has_lost_is_still_shown(team: Cli, tmp_path: Path) -> None:
    team.ok("compose", recipe(tmp_path / "recipe.yaml", "1.0.0"))
    files = team.json("show", "acme/both:1.0.0")["files"]
    (lost,) = [file["sha256"] for file in files if file["path"] == NOTE_FILE]
    stored.lose(team, lost)
    shown = team("show", "acme/both:1.0.0")
    assert shown.code == 0
    assert "0.8 x acme/sql:1.0.0" in shown.out
    assert "warning: " in shown.err


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"null", b"{}", b"\xff", b'{"note": 3}', b'{"note": {"lock": 3}}', b"[" * 100_000,
        b'{"note": {"lock": {"inputs": [3], "method": "stack", "settings": {}}}}',
        b'{"note": {}, "adapters": [{"name": "a", "digest": "b", "weight": "x"}], "method": "stack", "settings": {}}',
        b'{"note": {}, "adapters": [], "method": "stack", "settings": 3}',
        b'{"note": {}, "adapters": [], "method": "stack", "settings": {}, "rounding": {"mode": "up"}}',
    ],
)  # fmt: skip
def test_a_note_that_is_none_tells_nothing(content: bytes) -> None:
    assert of_note(content) is None


def test_two_members_of_one_repository_are_both_listed() -> None:
    rows = [{"name": "a", "digest": digest, "weight": 1} for digest in ("x", "y")]
    made = of_note(json.dumps({"note": {}, "adapters": rows, "method": "stack", "settings": {}}).encode())
    assert side_by_side(None, made)[-1] == {"name": "member a", "old": None, "new": "1 x x, 1 x y"}


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("0-9=0.5", "0.5 in layers 0-9"),
        ("3=0", "0 in layer 3"),
        ("q_proj=1", "1 in q_proj"),
        ("0-9/mlp.*=2", "2 in layers 0-9 of mlp.*"),
    ],
)
def test_a_rule_in_words(rule: str, words: str) -> None:
    assert rule_words(parse_rule(rule)) == words
