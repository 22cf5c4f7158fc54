"""A worker's key signs only compositions of signed releases, and a release shows whose signature it has."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from composer.formats.recipes.recipe import parse_recipe
from registry.domain.access.audit import Actor
from registry.domain.access.roles import EVERYWHERE, Role
from registry.domain.compositions import compositions
from registry.formats.signatures import fingerprint
from registry.worker.runner import run_one
from registry.worker.steps import KINDS
from tests.scenarios.test_crashes import resources_of
from tests.scenarios.test_signatures import Keys
from tests.scenarios.traces import api_of
from tests.scenarios.world import Cli, Ran, World


@pytest.fixture
def team_keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path, "team")


@pytest.fixture
def worker_keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path, "worker")


@pytest.fixture
def signing(stocked_embedded: Cli, team_keys: Keys, worker_keys: Keys) -> Cli:
    """`strict` accepts releases signed by the team or the worker, `open` accepts everything; the worker has its key."""
    cli = stocked_embedded
    keys = ("--signing-key", team_keys.public, "--signing-key", worker_keys.public)
    cli.ok("namespace", "set", "strict", "--require-signature", *keys)
    cli.ok("namespace", "set", "open", *keys)
    return replace(cli, environment={**cli.environment, "ADAPTORY_SIGNING_KEY": str(worker_keys.private)})


def compose(cli: Cli, directory: Path, inputs: list[str], **outputs: str) -> Ran:
    recipe: dict[str, Any] = {"inputs": inputs, "method": "stack", "gates": [], "probe": 0, **outputs}
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return cli("compose", path, "--follow", "--json")


def policy(cli: Cli, directory: Path, **fields: object) -> None:
    path = directory / "policy.yaml"
    path.write_text(yaml.safe_dump({"version": 1, **fields}))
    cli.ok("policy", "set", "strict/evil@prod", path)


def test_a_worker_signs_nothing_that_was_made_of_an_unsigned_release(
    signing: Cli, world: World, team_keys: Keys, tmp_path: Path
) -> None:
    signing.ok("push", world.adapters["sql"], "open/evil:1.0.0", "--base", "tiny")
    signing.ok("push", world.adapters["support"], "open/good:1.0.0", "--base", "tiny", "--sign", team_keys.private)
    for inputs in (["open/evil:1.0.0"], ["open/good:1.0.0", "open/evil:1.0.0"]):
        for output in ({"adapter": "strict/evil:1.0.0"}, {"model": "strict/merged:1.0.0"}):
            jobs = signing.json("jobs")["items"]
            refused = compose(signing, tmp_path, inputs, **output)
            error = refused.json["error"]
            assert (refused.code, error["code"], error["subject"]) == (1, "inputs_unsigned", "open/evil:1.0.0")
            assert "adaptory sign open/evil:1.0.0 --key KEY.pem" in error["next"]
            assert signing.json("jobs")["items"] == jobs, "nothing was begun"
    assert signing("show", "strict/evil").code == 3


def test_a_composition_of_unsigned_releases_is_unsigned_where_no_signature_is_required(
    signing: Cli, world: World, team_keys: Keys, tmp_path: Path
) -> None:
    signing.ok("push", world.adapters["sql"], "open/evil:1.0.0", "--base", "tiny")
    assert compose(signing, tmp_path, ["open/evil:1.0.0"], adapter="open/again:1.0.0").code == 0
    shown = signing.json("show", "open/again:1.0.0")
    assert (shown["signed_by"], shown["signed_as"]) == (None, None)
    assert compose(signing, tmp_path, ["open/again:1.0.0"], adapter="strict/evil:1.0.0").code == 1
    signing.ok("sign", "open/evil:1.0.0", "--key", team_keys.private)
    assert compose(signing, tmp_path, ["open/again:1.0.0"], adapter="strict/evil:1.0.0").code == 1
    assert compose(signing, tmp_path, ["open/evil:1.0.0"], adapter="strict/evil:1.0.0").code == 0


@pytest.mark.long
def test_a_release_and_a_policy_tell_a_workers_signature_from_a_publishers(
    signing: Cli, world: World, team_keys: Keys, worker_keys: Keys, tmp_path: Path
) -> None:
    signing.ok("push", world.adapters["sql"], "open/good:1.0.0", "--base", "tiny", "--sign", team_keys.private)
    assert signing.json("show", "open/good:1.0.0")["signed_as"] == "publisher"
    assert compose(signing, tmp_path, ["open/good:1.0.0"], adapter="strict/evil:1.0.0").code == 0
    shown = signing.json("show", "strict/evil:1.0.0")
    assert (shown["signed_by"], shown["signed_as"]) == (fingerprint(worker_keys.pem), "worker")
    assert "by a worker" in signing.ok("show", "strict/evil:1.0.0").out
    policy(signing, tmp_path, signature="publisher")
    refused = signing("promote", "strict/evil:1.0.0", "--to", "prod", "--json").json["error"]
    assert [finding["detail"] for finding in refused["findings"]] == ["only a worker has signed it"]
    signing.ok("sign", "strict/evil:1.0.0", "--key", worker_keys.private)
    assert signing("promote", "strict/evil:1.0.0", "--to", "prod").code == 1, "the worker's key stays the worker's"
    with api_of(signing) as api:  # nor is its bundle anybody else's, once it was downloaded
        (bundle,) = api.get("/v1/adapters/strict/evil/releases/1.0.0/signatures")["signatures"]
        api.post("/v1/adapters/strict/evil/releases/1.0.0/signatures", {"bundle": bundle["bundle"]})
        assert bundle["signed_as"] == "worker"
    assert signing("promote", "strict/evil:1.0.0", "--to", "prod").code == 1
    signing.ok("sign", "strict/evil:1.0.0", "--key", team_keys.private)
    shown = signing.json("show", "strict/evil:1.0.0")
    assert (shown["signed_by"], shown["signed_as"]) == (fingerprint(team_keys.pem), "publisher")
    signing.ok("promote", "strict/evil:1.0.0", "--to", "prod")


def test_a_composition_counts_as_signed_input_only_while_its_own_inputs_do(
    signing: Cli, world: World, team_keys: Keys, worker_keys: Keys, tmp_path: Path
) -> None:
    """Composed by an earlier version, or before a key was withdrawn."""
    signing.ok("push", world.adapters["sql"], "open/good:1.0.0", "--base", "tiny", "--sign", team_keys.private)
    assert compose(signing, tmp_path, ["open/good:1.0.0"], adapter="strict/evil:1.0.0").code == 0
    assert compose(signing, tmp_path, ["strict/evil:1.0.0"], adapter="strict/second:1.0.0").code == 0
    other = Keys(tmp_path, "other")
    keys = ("--signing-key", other.public, "--signing-key", worker_keys.public)
    signing.ok("namespace", "set", "strict", *keys)
    refused = compose(signing, tmp_path, ["strict/evil:1.0.0"], adapter="strict/third:1.0.0").json["error"]
    assert (refused["code"], "composed from releases that no key" in refused["detail"]) == ("inputs_unsigned", True)


def test_a_composition_that_began_under_a_key_is_not_signed_once_the_key_is_withdrawn(
    signing: Cli, world: World, team_keys: Keys, worker_keys: Keys, tmp_path: Path
) -> None:
    signing.ok("push", world.adapters["sql"], "open/good:1.0.0", "--base", "tiny", "--sign", team_keys.private)
    recipe = {"inputs": ["open/good:1.0.0"], "method": "stack", "gates": [], "probe": 0, "adapter": "strict/evil:1.0.0"}
    with resources_of(signing.environment) as resources:
        with resources.write() as session:
            compositions.create(
                session,
                Actor("mia", resources.clock(), {EVERYWHERE: Role.ADMIN}, mints=True),
                parse_recipe(recipe),
                plan_only=False,
                signer=fingerprint(worker_keys.pem),
            )
        signing.ok("namespace", "set", "strict", "--signing-key", worker_keys.public)
        assert run_one(resources, KINDS, "worker")
    (job,) = signing.json("jobs")["items"]
    assert (job["state"], job["error"]["code"]) == ("refused", "inputs_unsigned")
    assert signing("show", "strict/evil").code == 3
