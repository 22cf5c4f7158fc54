"""A signature is for one release: the same files under another name, number or base are not signed by it."""

import json
import re
import shutil
from base64 import b64decode
from pathlib import Path
from typing import Any

import pytest
import yaml

from registry.client.signing import verify_release
from registry.errors import Invalid, Refused
from registry.formats.references import parse_reference
from registry.formats.signatures import SIGNATURE_FILE, fingerprint
from registry.wire.catalog import BaseRef, ReleaseOut
from tests.doses import further
from tests.scenarios.test_signatures import Keys, require, stock_sign
from tests.scenarios.traces import api_of
from tests.scenarios.world import Cli, World


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path, "team")


@pytest.fixture
def pulled(stocked_embedded: Cli, world: World, keys: Keys, tmp_path: Path) -> Path:
    """The files of acme/sql:1.0.0, which its team signed and then yanked."""
    cli = stocked_embedded
    cli.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny", "--sign", keys.private)
    cli.ok("pull", "acme/sql:1.0.0", "-o", tmp_path / "pulled")
    cli.ok("yank", "acme/sql:1.0.0", "--reason", "leaks a name")
    return tmp_path / "pulled"


@pytest.mark.parametrize("known", [True, *further(False)])
def test_files_that_were_signed_and_yanked_cannot_come_back_under_another_number_name_or_base(
    stocked_embedded: Cli, world: World, keys: Keys, pulled: Path, tmp_path: Path, known: bool
) -> None:
    """By a publisher without the key, whether or not the namespace trusts a key."""
    cli = stocked_embedded
    if known:
        require(cli, keys, covers="release")
    for target, differs in (("acme/sql:9.0.0", "version '1.0.0', not '9.0.0'"), ("acme/other:1.0.0", "repository")):
        refused = cli("push", pulled, target, "--base", "tiny")
        assert (refused.code, "belongs to another release" in refused.err, differs in refused.err) == (1, True, True)
    shutil.copytree(world.base, tmp_path / "cast")
    for shard in (tmp_path / "cast").glob("*.safetensors"):
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
    cli.ok("base", "add", tmp_path / "cast", "--name", "cast")
    refused = cli("push", pulled, "acme/sql:9.0.0", "--base", "cast")
    assert (refused.code, "base '" in refused.err) == (1, True)
    assert [row["version"] for row in cli.json("log", "acme/sql")["items"]] == ["1.0.0"]
    assert cli("show", "acme/other").code == 3


def test_verifying_asks_for_the_release_and_not_for_its_files(
    stocked_embedded: Cli, world: World, keys: Keys, tmp_path: Path
) -> None:
    """With a registry that claims another release than its signer did."""
    cli = stocked_embedded
    cli.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny", "--sign", keys.private)
    cli.ok("pull", "acme/sql", "-o", tmp_path / "out", "--verify", keys.public, "--signature-covers", "release")
    with api_of(cli) as api:
        release = api.get("/v1/adapters/acme/sql/releases/1.0.0", ReleaseOut)
        asked = parse_reference("acme/sql")
        verify_release(api, release, asked, tmp_path / "out", keys.pem)
        base = BaseRef(digest="0" * 64, name="tiny")
        for changed in ({"version": "2.0.0"}, {"base": base}):
            with pytest.raises(Refused, match="another release"):
                verify_release(api, release.model_copy(update=changed), asked, tmp_path / "out", keys.pem)
        for other in ("acme/support", "acme/sql:^2", "acme/sql:1.0.1", "acme/sql#abcdef0"):
            with pytest.raises(Invalid, match=rf"answered {re.escape(other)} with acme/sql:1\.0\.0"):
                verify_release(api, release, parse_reference(other), tmp_path / "out", keys.pem)
    shown = cli.json("verify", tmp_path / "out", "--key", keys.public)
    assert shown["signed_release"]["version"] == "1.0.0"


def test_a_signature_of_files_alone_says_so_and_is_refused_where_it_has_to_cover_the_release(
    stocked_embedded: Cli, world: World, keys: Keys, tmp_path: Path
) -> None:
    cli, directory = stocked_embedded, tmp_path / "stock"
    shutil.copytree(world.adapters["sql"], directory)
    stock_sign(directory, keys)
    require(cli, keys, covers="release")
    refused = cli("push", directory, "acme/sql:1.0.0", "--base", "tiny")
    assert (refused.code, "covers only files" in refused.err) == (1, True)
    require(cli, keys, covers="files")
    pushed = cli.ok("push", directory, "acme/sql:1.0.0", "--base", "tiny")
    assert "covers only files" in pushed.err
    assert "(files only)" in cli.ok("show", "acme/sql").out
    taken = cli.ok("pull", "acme/sql", "-o", tmp_path / "out", "--verify", keys.public)
    assert "covers only the files" in taken.err
    strict = ("--verify", keys.public, "--signature-covers", "release")
    assert cli("pull", "acme/sql", "-o", tmp_path / "strict", *strict).code == 1
    require(cli, keys, covers="release")
    refused = cli("promote", "acme/sql:1.0.0", "--to", "prod")
    assert (refused.code, "adaptory sign acme/sql:1.0.0" in refused.err) == (1, True)
    signed = cli.json("sign", "acme/sql:1.0.0", "--key", keys.private)
    assert (signed["signed_by"], signed["signature_covers"]) == (fingerprint(keys.pem), "release")
    cli.ok("promote", "acme/sql:1.0.0", "--to", "prod")
    cli.ok("pull", "acme/sql", "-o", tmp_path / "strict", *strict)
    (row,) = cli.json("audit", "--act", "release:sign")["items"]
    assert (row["before"]["signature_covers"], row["after"]["signature_covers"]) == ("files", "release")
    later = Keys(tmp_path, "later")
    cli.ok("namespace", "set", "acme", "--signing-key", keys.public, "--signing-key", later.public)
    shown = cli.ok("audit", "--act", "namespace:set").out
    assert fingerprint(later.pem) in shown
    assert "BEGIN PUBLIC KEY" not in shown
    cli.ok("sign", "acme/sql:1.0.0", "--key", later.private)
    row = cli.json("audit", "--act", "release:sign")["items"][0]
    assert row["before"]["signatures"] == [fingerprint(keys.pem)]
    assert row["after"]["signatures"] == [fingerprint(keys.pem), fingerprint(later.pem)]


def test_a_release_is_signed_afterwards_by_a_key_that_its_namespace_trusts(
    stocked: Cli, world: World, keys: Keys, tmp_path: Path
) -> None:
    stranger, sign = Keys(tmp_path, "stranger"), ("sign", "acme/sql", "--key")
    commit = stocked.json("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny")["release"]["commit"]
    refused = stocked(*sign, keys.private)
    assert (refused.code, "--signing-key PUB.pem" in refused.err) == (1, True)
    require(stocked, keys, required=False)
    assert stocked(*sign, stranger.private).code == 1
    assert stocked.json(*sign, keys.private)["commit"] == commit, "a release never changes"
    strict = ("--verify", keys.public, "--signature-covers", "release")
    taken = stocked.json("pull", "acme/sql", "-o", tmp_path / "out", *strict)
    assert taken["signed_release"]["commit"] == commit
    assert stocked("pull", "acme/sql", "-o", tmp_path / "no", "--verify", stranger.public).code == 1


@pytest.mark.long
def test_a_release_that_two_keys_signed_can_be_promoted_while_either_key_is_trusted(
    stocked: Cli, world: World, keys: Keys, tmp_path: Path
) -> None:
    other, third = Keys(tmp_path, "other"), Keys(tmp_path, "third")
    require(stocked, keys, other, covers="release")
    stocked.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny", "--sign", keys.private)
    signed = stocked.ok("sign", "acme/sql:1.0.0", "--key", other.private)
    assert fingerprint(other.pem) in signed.out
    for channel, trusted in (("first", keys), ("second", other)):
        require(stocked, trusted, covers="release")
        stocked.ok("promote", "acme/sql:1.0.0", "--to", channel, "--new-channel")
    require(stocked, third, covers="release")
    assert "unsigned" in stocked("promote", "acme/sql:1.0.0", "--to", "third", "--new-channel", "--json").out


def test_the_files_of_a_yanked_release_warn_and_are_refused_where_signatures_are_required(
    stocked_embedded: Cli, world: World, keys: Keys
) -> None:
    cli = stocked_embedded
    push = ("push", world.adapters["sql"], "--base", "tiny")
    cli.ok(*push, "acme/sql:1.0.0")
    cli.ok("yank", "acme/sql:1.0.0", "--reason", "leaks a name")
    assert "yanked_files" not in cli.ok(*push, "acme/sql:1.0.0").err
    warned = cli.ok(*push, "acme/line:1.0.0")
    assert "These are the files of acme/sql:1.0.0, which is yanked: leaks a name." in warned.err
    require(cli, keys, covers="release")
    refused = cli(*push, "acme/sql:1.0.1", "--sign", keys.private)
    assert (refused.code, "adaptory unyank acme/sql:1.0.0" in refused.err) == (1, True)
    cli.ok("unyank", "acme/sql:1.0.0", "--reason", "it was another one")
    cli.ok(*push, "acme/sql:1.0.1", "--sign", keys.private)


def test_a_bump_has_its_number_before_it_is_signed_and_the_same_push_again_is_one_release(
    stocked: Cli, world: World, keys: Keys, tmp_path: Path
) -> None:
    require(stocked, keys, covers="release")
    push = ("push", "acme/sql", "--base", "tiny", "--sign", keys.private, "--bump")
    first = stocked.json(push[0], world.adapters["sql"], *push[1:], "minor")
    again = stocked.json(push[0], world.adapters["sql"], *push[1:], "minor")
    assert (first["created"], again["created"]) == (True, False)
    assert again["release"]["commit"] == first["release"]["commit"]
    assert first["sent"] == len(first["release"]["files"])
    other = stocked.json(push[0], world.adapters["other-sql"], *push[1:], "auto")["release"]
    assert [first["release"]["version"], other["version"]] == ["0.1.0", "0.1.1"]
    stocked.ok("pull", "acme/sql", "-o", tmp_path / "out", "--verify", keys.public, "--signature-covers", "release")
    payload = json.loads((tmp_path / "out" / SIGNATURE_FILE).read_text())["dsseEnvelope"]["payload"]
    named: dict[str, Any] = json.loads(b64decode(payload))["predicate"]["release"]
    assert (named["repository"], named["version"], named["base"]) == ("acme/sql", "0.1.1", other["base"]["digest"])


@pytest.mark.long
def test_an_unsigned_composition_is_refused_when_it_is_requested_and_a_worker_with_a_key_signs(
    stocked_embedded: Cli, world: World, keys: Keys, tmp_path: Path
) -> None:
    cli = stocked_embedded
    cli.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny")
    cli.ok("push", world.adapters["support"], "acme/support:1.0.0", "--base", "tiny")
    require(cli, keys, covers="release")
    recipe = {"inputs": ["acme/sql:1.0.0", "acme/support:1.0.0"], "method": "stack", "adapter": "acme/sum:1.0.0"}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    jobs = len(cli.json("jobs")["items"])
    refused = cli("compose", path)
    assert (refused.code, "ADAPTORY_SIGNING_KEY" in refused.err) == (1, True)
    assert len(cli.json("jobs")["items"]) == jobs, "nothing was begun"
    signing = Cli({**cli.environment, "ADAPTORY_SIGNING_KEY": str(keys.private)})
    assert "inputs_unsigned" in signing("compose", path, "--json").out
    for name in ("sql", "support"):
        cli.ok("sign", f"acme/{name}:1.0.0", "--key", keys.private)
    made = signing.json("compose", path, "--follow")
    assert made["state"] == "done", made
    shown = cli.json("show", "acme/sum:1.0.0")
    assert (shown["signed_by"], shown["signature_covers"]) == (fingerprint(keys.pem), "release")
    cli.ok("pull", "acme/sum", "-o", tmp_path / "out", "--verify", keys.public, "--signature-covers", "release")
    assert signing.json("compose", path, "--follow")["state"] == "done", "repeating it is not a conflict"
    lost = Cli({**cli.environment, "ADAPTORY_SIGNING_KEY": str(tmp_path / "nowhere.pem")})("compose", path)
    assert (lost.code, "nowhere.pem" in lost.err) == (7, True)
