"""Facts for a release manager's decisions: licences, deprecations, and an adapter's scores on the next base."""

import json
import shutil
from pathlib import Path

import yaml
from safetensors.torch import load_file, save_file

from tests.composer.small_model import save_gpt2
from tests.scenarios.world import Cli, World


def with_card(directory: Path, adapter: Path, **front: object) -> Path:
    """A copy of an adapter whose model card states this."""
    shutil.copytree(adapter, directory)
    (directory / "README.md").write_text(f"---\n{yaml.safe_dump(front)}---\n")
    return directory


def test_a_policy_names_the_licences_that_it_refuses_and_search_finds_them(
    stocked_embedded: Cli, world: World, tmp_path: Path
) -> None:
    cli = stocked_embedded
    cli.ok("base", "add", world.base, "--name", "tiny", "--license", "apache-2.0")
    data = [{"name": "tickets", "license": "cc-by-nc-4.0"}]
    open_ = with_card(tmp_path / "open", world.adapters["sql"], license="mit", data=[{"name": "own", "license": "mit"}])
    mixed = with_card(tmp_path / "mixed", world.adapters["support"], license="apache-2.0", data=data)
    cli.ok("push", open_, "acme/open:1.0.0", "--base", "tiny")
    cli.ok("push", mixed, "acme/mixed:1.0.0", "--base", "tiny")
    recipe = {"inputs": ["acme/open:1.0.0", "acme/mixed:1.0.0"], "method": "mean", "adapter": "acme/both:1.0.0"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "probe": 0, "gates": []}))
    cli.ok("compose", tmp_path / "recipe.yaml")
    assert cli.json("show", "acme/mixed")["licenses"] == {
        "base": "Apache-2.0", "adapter": "Apache-2.0", "data": ["CC-BY-NC-4.0"],
    }  # fmt: skip
    hits = cli.json("search", "--license", "Apache-2.0", "--base-license", "apache-2.0")["items"]
    assert [release["repository"] for release in hits] == ["acme/mixed"]
    licenses = {"stated": ["base", "adapter"], "refuse": [{"data": "CC-BY-NC-4.0", "adapter": "Apache-2.0"}, "GPL-3.0"]}
    (tmp_path / "policy.yaml").write_text(yaml.safe_dump({"version": 1, "licenses": licenses}))
    for name in ("open", "mixed", "both"):
        cli.ok("policy", "set", f"acme/{name}@prod", tmp_path / "policy.yaml")
    cli.ok("promote", "acme/open:1.0.0", "--to", "prod")
    for name in ("mixed", "both"):  # a composition carries the licences of its inputs
        refused = cli("promote", f"acme/{name}:1.0.0", "--to", "prod")
        assert refused.code == 1
        assert "refused combination: adapter Apache-2.0 with data CC-BY-NC-4.0" in refused.err
        assert "pass  no GPL-3.0" in refused.err


def test_a_deprecation_is_shown_everywhere_and_blocks_nothing(
    stocked_embedded: Cli, world: World, tmp_path: Path
) -> None:
    cli = stocked_embedded
    for version, name in (("1.0.0", "sql"), ("1.1.0", "other-sql")):
        cli.ok("push", world.adapters[name], f"acme/sql:{version}", "--base", "tiny")
    assert cli("deprecate", "acme/sql:1.0.0").code == 2
    assert cli("deprecate", "acme/sql:1.0.0", "--reason", "old", "--successor", "acme/sql:9.0.0").code == 3
    cli.ok("deprecate", "acme/sql:1.0.0", "--reason", "old dialect", "--successor", "acme/sql:1.1.0")
    words = "acme/sql:1.0.0 is deprecated: old dialect; use acme/sql:1.1.0."
    promoted = cli.ok("promote", "acme/sql:1.0.0", "--to", "prod")
    pulled = cli.ok("pull", "acme/sql@prod", "-o", tmp_path / "pulled")
    shown = cli.ok("show", "acme/sql:1.0.0")
    assert all(f"warning: {words}" in ran.err for ran in (promoted, pulled, shown))
    assert "old dialect; use acme/sql:1.1.0" in shown.out
    assert "deprecated: use acme/sql:1.1.0" in cli.ok("search", "--base", "tiny").out
    assert cli.ok("pull", "acme/sql:1.1.0", "-o", tmp_path / "other").err.count("deprecated") == 0
    cli.ok("base", "deprecate", "tiny", "--reason", "the next one is out")
    assert "The base tiny is deprecated: the next one is out." in cli.ok("show", "acme/sql:1.1.0").err
    cli.ok("deprecate", "acme/sql:1.0.0", "--undo")
    cli.ok("base", "deprecate", "tiny", "--undo")
    assert cli.ok("show", "acme/sql:1.0.0").err == ""
    acts = [row["act"] for row in cli.json("audit", "--subject", "acme/sql:1.0.0")["items"]]
    assert acts == ["release:deprecate", "release:deprecate", "release:publish"]


def test_an_upgrade_lists_what_fits_the_next_base_and_measures_it_in_one_job(
    stocked_embedded: Cli, world: World, tmp_path: Path
) -> None:
    cli = stocked_embedded
    for name in ("sql", "support"):
        cli.ok("push", world.adapters[name], f"acme/{name}:1.0.0", "--base", "tiny")
    cli.ok("eval", "acme/sql", "--suite", "sql-exact")
    cli.ok("promote", "acme/sql:1.0.0", "--to", "prod")
    following = tmp_path / "following"
    shutil.copytree(world.base, following)
    for shard in following.glob("*.safetensors"):
        tensors = {key: tensor * 1.01 if "self_attn" in key else tensor for key, tensor in load_file(shard).items()}
        save_file(tensors, shard, metadata={"format": "pt"})
    cli.ok("base", "add", following, "--name", "following")
    cli.ok("base", "deprecate", "tiny", "--reason", "old", "--successor", "following")
    assert "following has no successor" in cli("base", "upgrade", "following").err
    assert json.loads(cli("base", "upgrade", "tiny", "tiny", "--json").out)["error"]["code"] == "same_base"
    report = cli.json("base", "upgrade", "tiny")
    event = cli.json("audit", "--event", "evaluation:request")["items"][0]
    assert (event["subject"], event["after"]["upgrade_of"]) == (f"job/{report['job']}", report["old"]["digest"])
    assert "acme/sql:1.0.0" in event["after"]["subjects"]
    sql, support = report["adapters"]
    assert (report["state"], sql["repository"], sql["channels"], sql["fits"]) == ("done", "acme/sql", ["prod"], True)
    assert (support["fits"], support["scores"]) == (True, []), "it has no scores, so no suite is its own"
    nll = next(score for score in sql["scores"] if score["metric"] == "nll")
    assert (nll["suite"], nll["n"], nll["base"] is None) == ("sql-exact", 6, False)
    assert abs(nll["gain"] - (nll["old"] - nll["new"])) < 1e-9
    assert nll["old"] != nll["new"]
    recorded = next(score for score in cli.json("show", "acme/sql")["scores"] if score["metric"] == "nll")
    assert recorded["value"] == nll["old"], "a release stays on the base that it was made for"
    assert "acme/sql:1.0.0" in cli.ok("--wide", "base", "upgrade", "tiny").out.partition("scores")[2]
    other = save_gpt2(tmp_path / "other")
    cli.ok("base", "add", other, "--name", "other")
    listed = cli.ok("base", "upgrade", "tiny", "other", "--plan").out
    assert "2 adapters on tiny, 0 fit other" in listed
    for shard in following.glob("*.safetensors"):
        save_file({key: tensor * 2 for key, tensor in load_file(shard).items()}, shard, metadata={"format": "pt"})
    failed = cli("base", "upgrade", "tiny", "--suite", "terraform-exact", "--json")  # not measured yet
    document = json.loads(failed.out)
    assert (document["state"], failed.code) == ("refused", 1), "one document, and the exit code of what ended the job"
    assert document["error"]["detail"] in failed.err
