"""Signed releases: made with a local key, verified before a directory appears, required by a namespace's policy."""

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from model_signing import signing as stock_signing
from model_signing import verifying as stock_verifying

from registry.client.push import collect, push
from registry.client.selection import select_files
from registry.client.signing import read_public_key, verify_directory
from registry.errors import Invalid, Refused
from registry.formats.references import parse_repository
from registry.formats.signatures import SIGNATURE_FILE, fingerprint, open_signature
from tests.scenarios.traces import api_of
from tests.scenarios.world import Cli, World

WEIGHTS = "adapter_model.safetensors"


class Keys:
    """A key pair in two files."""

    def __init__(self, directory: Path, name: str, curve: ec.EllipticCurve | None = None) -> None:
        self.key = ec.generate_private_key(curve or ec.SECP256R1())
        self.private, self.public = directory / f"{name}.pem", directory / f"{name}.pub.pem"
        self.private.write_bytes(self.key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption()))
        self.pem = self.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
        self.public.write_text(self.pem)


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path, "team")


@pytest.fixture
def stranger(tmp_path: Path) -> Keys:
    return Keys(tmp_path, "stranger")


@pytest.fixture
def signed(world: World, keys: Keys, tmp_path: Path) -> Path:
    """An adapter's directory that model-signing itself has signed."""
    directory = tmp_path / "signed"
    shutil.copytree(world.adapters["sql"], directory)
    stock_sign(directory, keys)
    return directory


def stock_sign(directory: Path, keys: Keys) -> None:
    signer = stock_signing.Config().use_elliptic_key_signer(private_key=keys.private)
    signature = directory.with_name("other.sig")
    (directory / SIGNATURE_FILE).unlink(missing_ok=True)
    signer.sign(directory, signature)
    signature.rename(directory / SIGNATURE_FILE)


def require(cli: Cli, *trusted: Keys, required: bool = True, covers: str = "files") -> None:
    with api_of(cli) as api:
        policy = {"require_signature": required, "signing_keys": [key.pem for key in trusted]}
        policy |= {"signature_covers": covers}
        api.put("/v1/namespaces/acme", policy)


def forged(directory: Path, keys: Keys, change: Callable[[dict[str, Any]], None]) -> None:
    """Signs any statement that a holder of the key could sign."""
    bundle = json.loads((directory / SIGNATURE_FILE).read_text())
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    change(statement)
    payload, kind = json.dumps(statement).encode(), bundle["dsseEnvelope"]["payloadType"]
    text = f"DSSEv1 {len(kind)} {kind} {len(payload)} ".encode() + payload
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(payload).decode()
    bundle["dsseEnvelope"]["signatures"][0]["sig"] = base64.b64encode(keys.key.sign(text, ec.ECDSA(SHA256()))).decode()
    (directory / SIGNATURE_FILE).write_text(json.dumps(bundle))


def test_a_signed_release_is_verified_when_it_is_pulled(
    stocked: Cli, world: World, keys: Keys, stranger: Keys, tmp_path: Path
) -> None:
    cli = stocked
    require(cli, keys, covers="release")
    release = cli.json("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny", "--sign", keys.private)[
        "release"
    ]
    assert release["signature_covers"] == "release"
    assert release["signed_by"] == fingerprint(keys.pem)
    assert SIGNATURE_FILE in {file["path"] for file in release["files"]}
    assert not (world.adapters["sql"] / SIGNATURE_FILE).exists(), "what training wrote is left alone"
    assert release["signed_by"] in cli.ok("show", "acme/sql").out
    cli.ok("pull", "acme/sql", "-o", tmp_path / "out", "--verify", keys.public)
    stock_verifying.Config().use_elliptic_key_verifier(public_key=keys.public).verify(
        tmp_path / "out", tmp_path / "out" / SIGNATURE_FILE
    )
    refused = cli("pull", "acme/sql", "-o", tmp_path / "other", "--verify", stranger.public)
    assert refused.code == 1
    assert f"was not made by {fingerprint(stranger.pem)[:12]}" in refused.err
    assert "public key from them" in refused.err
    assert "--sign" not in refused.err, "who pulls has nothing to sign"
    assert not (tmp_path / "other").exists()
    assert cli.json("verify", "acme/sql", "--key", keys.public)["signed_by"] == release["signed_by"]


def test_a_signature_names_what_is_released_and_no_other_file_of_the_directory(
    stocked: Cli, world: World, keys: Keys, tmp_path: Path
) -> None:
    directory = tmp_path / "adapter"
    shutil.copytree(world.adapters["sql"], directory)
    (directory / ".env").write_text("a secret")
    stocked.ok("push", directory, "acme/sql:1.0.0", "--base", "tiny", "--sign", keys.private)
    stocked.ok("pull", "acme/sql", "-o", tmp_path / "out")
    content = (tmp_path / "out" / SIGNATURE_FILE).read_bytes()
    assert ".env" not in base64.b64decode(json.loads(content)["dsseEnvelope"]["payload"]).decode()
    assert set(open_signature(content, [keys.pem]).files) == {path.name for path in directory.glob("[!.]*")}


@pytest.mark.on("PostgreSQL")
def test_an_unsigned_release_is_refused_by_policy_and_by_who_verifies(
    stocked: Cli, world: World, keys: Keys, stranger: Keys, tmp_path: Path
) -> None:
    cli, push_it = stocked, ("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny")
    cli.ok(*push_it)
    refused = cli("pull", "acme/sql", "-o", tmp_path / "out", "--verify", keys.public)
    assert (refused.code, (tmp_path / "out").exists()) == (1, False)
    assert "not signed" in refused.err
    require(cli, keys)
    assert not cli.json(*push_it)["created"], "what is released stays released"
    for options, why in (
        ((), "next: Push with --sign KEY.pem."),
        (("--sign", stranger.private), "a key that is trusted"),
    ):
        refused = cli("push", world.adapters["other-sql"], "acme/sql:1.1.0", "--base", "tiny", *options)
        assert refused.code == 1
        assert why in refused.err
    assert [row["version"] for row in cli.json("log", "acme/sql")["items"]] == ["1.0.0"]


def test_the_registry_refuses_a_signature_that_is_not_of_these_files(
    stocked_embedded: Cli, signed: Path, keys: Keys
) -> None:
    """Past our own client, which would sign anew: the registry judges the digests itself."""
    cli = stocked_embedded
    require(cli, keys)
    (signed / "added.txt").write_text("not signed")
    with api_of(cli) as api:

        def publish() -> str | None:
            request = {"version": "1.0.0", "base": "tiny"}
            files, name = collect(select_files(signed, "model")), parse_repository("acme/sql")
            return push(api, files, name, "adapter", request, lambda _count: None)[0].release.signed_by

        with pytest.raises(Refused, match=r"added\.txt.* not covered"):
            publish()
        (signed / "added.txt").unlink()
        readme = signed / "README.md"
        kept = readme.read_bytes()
        readme.write_text("changed")
        with pytest.raises(Refused, match=r"README\.md.* was changed"):
            publish()
        readme.write_bytes(kept)
        assert publish() == fingerprint(keys.pem)


def test_a_signature_that_no_policy_asks_for_is_kept_and_claims_nothing(
    stocked_embedded: Cli, signed: Path, keys: Keys, stranger: Keys
) -> None:
    cli = stocked_embedded
    published = cli.json("push", signed, "acme/sql:1.0.0", "--base", "tiny")["release"]
    assert published["signed_by"] is None, "no key is known here"
    require(cli, stranger, required=False)
    assert cli("push", signed, "acme/sql:1.0.1", "--base", "tiny", "--notes", "signed by whom?").code == 1
    require(cli, stranger, keys, required=False)
    assert cli.json("push", signed, "acme/sql:1.0.1", "--base", "tiny")["release"]["signed_by"] == fingerprint(keys.pem)


def test_a_signature_of_other_files_is_warned_of_where_no_policy_refuses_it(
    stocked_embedded: Cli, signed: Path
) -> None:
    cli = stocked_embedded
    assert not [row for row in _warnings(cli, signed, "1.0.0") if row["subject"] == SIGNATURE_FILE]
    (signed / "README.md").write_text("changed")
    pushed = cli.ok("push", signed, "acme/sql:1.0.1", "--base", "tiny")
    assert "warning: model.sig is not a signature of these files: 'README.md' was changed" in pushed.err
    assert "--sign KEY.pem" in pushed.err
    for version, content in (("1.0.2", b"no bundle"), ("1.0.3", b"")):
        (signed / SIGNATURE_FILE).write_bytes(content)
        (warning,) = (row for row in _warnings(cli, signed, version) if row["code"] == "signature_stale")
        assert "cannot be read" in warning["message"]


def _warnings(cli: Cli, directory: Path, version: str) -> list[dict[str, Any]]:
    return cli.json("push", directory, f"acme/sql:{version}", "--base", "tiny")["warnings"]


def test_a_release_that_came_before_its_key_was_trusted_says_how_it_is_promoted_all_the_same(
    stocked_embedded: Cli, signed: Path, keys: Keys
) -> None:
    cli = stocked_embedded
    cli.ok("push", signed, "acme/sql:1.0.0", "--base", "tiny")
    require(cli, keys)
    refused = cli("promote", "acme/sql:1.0.0", "--to", "prod")
    assert refused.code == 1
    assert "none of them has signed acme/sql:1.0.0" in refused.err
    assert "adaptory sign acme/sql:1.0.0" in refused.err
    published = cli.json("push", signed, "acme/sql:1.0.1", "--base", "tiny")["release"]
    assert published["signed_by"] == fingerprint(keys.pem)
    cli.ok("promote", "acme/sql:1.0.1", "--to", "prod")


@pytest.mark.parametrize("file", [WEIGHTS, "adapter_config.json", "README.md"])
def test_a_tampered_file_is_named(signed: Path, keys: Keys, file: str) -> None:
    assert verify_directory(signed, keys.pem).fingerprint == fingerprint(keys.pem)
    content = bytearray((signed / file).read_bytes())
    content[-1] ^= 1
    (signed / file).write_bytes(content)
    with pytest.raises(Refused, match="was changed after it was signed") as refused:
        verify_directory(signed, keys.pem)
    assert refused.value.subject == file


def test_a_missing_and_an_added_file_are_named(signed: Path, keys: Keys) -> None:
    (signed / "README.md").unlink()
    (signed / ".hidden").write_text("added")
    with pytest.raises(Refused) as refused:
        verify_directory(signed, keys.pem)
    assert {finding["subject"] for finding in refused.value.findings} == {"README.md", ".hidden"}


def test_what_hides_behind_a_link_to_a_directory_is_not_taken_for_verified(
    signed: Path, keys: Keys, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "code.py").write_text("not signed")
    (signed / "extra").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Invalid, match="link to a directory") as refused:
        verify_directory(signed, keys.pem)
    assert refused.value.subject == "extra"


def test_a_tampered_manifest_is_refused_whatever_it_says(signed: Path, keys: Keys) -> None:
    bundle = json.loads((signed / SIGNATURE_FILE).read_text())
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    statement["predicate"]["resources"][0]["digest"] = "0" * 64
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    (signed / SIGNATURE_FILE).write_text(json.dumps(bundle))
    with pytest.raises(Refused, match="changed afterwards") as refused:
        verify_directory(signed, keys.pem)
    assert refused.value.subject == SIGNATURE_FILE


def test_names_in_a_signature_are_compared_and_never_opened(signed: Path, keys: Keys, tmp_path: Path) -> None:
    outside = tmp_path / "outside.txt"
    outside.write_text("not ours")
    for name in ("../outside.txt", str(outside), "a/../../outside.txt", "x" * 5000):
        entry = {"name": name, "algorithm": "sha256", "digest": "0" * 64}
        forged(signed, keys, lambda statement, entry=entry: statement["predicate"]["resources"].append(entry))
        with pytest.raises(Refused, match="is signed, but missing") as refused:
            verify_directory(signed, keys.pem)
        assert refused.value.subject == name[:400]
        stock_sign(signed, keys)


CHANGES: dict[str, Callable[[dict[str, Any]], None]] = {
    "another predicate": lambda statement: statement.update(predicateType="https://example/v1"),
    "another digest": lambda statement: statement["predicate"]["resources"][0].update(algorithm="blake2b"),
    "a file twice": lambda statement: statement["predicate"]["resources"].append(
        statement["predicate"]["resources"][0]
    ),
    "no resources": lambda statement: statement["predicate"].pop("resources"),
    "resources of another kind": lambda statement: statement["predicate"].update(resources=["a", 3, None]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_statement_of_another_form_is_invalid_even_when_it_is_signed(signed: Path, keys: Keys, change: str) -> None:
    forged(signed, keys, CHANGES[change])
    with pytest.raises(Invalid, match=SIGNATURE_FILE):
        verify_directory(signed, keys.pem)


NO_SIGNATURES = (
    b"",
    b"\x80\x04\x95pickle",
    b"[]",
    b"{}",
    b"[" * 50_000,
    b'{"dsseEnvelope": {"payloadType": "text", "signatures": []}}',
    b'{"dsseEnvelope": {"payloadType": "application/vnd.in-toto+json", "payload": "*", "signatures": [{"sig": 3}]}}',
)


@pytest.mark.parametrize("content", NO_SIGNATURES)
def test_whatever_is_no_signature_is_invalid_and_nothing_else(content: bytes, keys: Keys) -> None:
    with pytest.raises(Invalid, match=SIGNATURE_FILE):
        open_signature(content, [keys.pem])


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()])
def test_what_model_signing_signs_is_verified_on_each_of_its_curves(
    curve: ec.EllipticCurve, world: World, tmp_path: Path
) -> None:
    keys, directory = Keys(tmp_path, curve.name, curve), tmp_path / "adapter"
    shutil.copytree(world.adapters["sql"], directory)
    stock_sign(directory, keys)
    assert verify_directory(directory, keys.pem).fingerprint == fingerprint(keys.pem)


def test_a_policy_takes_only_keys_that_can_verify(stocked_embedded: Cli, keys: Keys, tmp_path: Path) -> None:
    odd = Keys(tmp_path, "odd", ec.SECP256K1())
    ed = ed25519.Ed25519PrivateKey.generate().public_key()
    for pem in ("no key", odd.pem, ed.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()):
        with api_of(stocked_embedded) as api, pytest.raises(Invalid, match="signing key"):
            api.put("/v1/namespaces/acme", {"require_signature": True, "signing_keys": [keys.pem, pem]})


def test_a_key_that_cannot_sign_or_verify_says_so(
    stocked_embedded: Cli, world: World, keys: Keys, tmp_path: Path
) -> None:
    other = ed25519.Ed25519PrivateKey.generate()
    wrong = tmp_path / "ed25519.pem"
    wrong.write_bytes(other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    text = tmp_path / "text.pem"
    text.write_text("no key")
    curve = Keys(tmp_path, "odd", ec.SECP256K1())
    for key in (wrong, text, keys.public, curve.private):
        refused = stocked_embedded("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny", "--sign", key)
        assert refused.code == 6, refused.err
        assert str(key) in refused.err
    for key in (text, keys.private, curve.public, tmp_path / "nowhere.pem"):
        with pytest.raises(Invalid):
            read_public_key(key)
