"""Attestations: the encoding that DSSE signs, and envelopes that other tools read."""

import base64
import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import in_toto_attestation.v1.statement_pb2 as in_toto
import pytest
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from google.protobuf import json_format
from in_toto_attestation.v1.statement import Statement as InTotoStatement
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import SSlibKey

from registry.errors import Invalid, Refused
from registry.formats.attestations import (
    PAYLOAD_TYPE,
    SCORES,
    Statement,
    attest,
    code_digest,
    key_id,
    new_key,
    open_attestation,
    pre_authentication_encoding,
    public_half,
)
from tests import services

STATEMENT = Statement(SCORES, {"adapter_model.safetensors": "a" * 64, "base": "b" * 64}, {"scores": []})


def test_the_signed_bytes_are_those_of_the_protocol() -> None:
    encoded = pre_authentication_encoding("http://example.com/HelloWorld", b"hello world")
    assert encoded == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"


def test_an_attestation_opens_with_its_key_and_with_no_other() -> None:
    private = new_key()
    envelope = attest(private, STATEMENT)
    assert open_attestation(envelope, public_half(private)) == STATEMENT
    with pytest.raises(Refused, match="was not made by the key"):
        open_attestation(envelope, public_half(new_key()))
    document = json.loads(envelope)
    changed = base64.b64decode(document["payload"]).replace(b"a" * 64, b"c" * 64)
    forged = json.dumps({**document, "payload": base64.b64encode(changed).decode()})
    with pytest.raises(Refused, match="changed afterwards"):
        open_attestation(forged, public_half(private))
    for broken in ("", "[]", json.dumps({**document, "signatures": []}), json.dumps({**document, "payloadType": "x"})):
        with pytest.raises(Invalid, match="cannot be read"):
            open_attestation(broken, public_half(private))
    with pytest.raises(Invalid, match="cannot be used"):
        public_half(b"no key")


def test_openssl_verifies_an_envelope(tmp_path: Path) -> None:
    private = new_key()
    document = json.loads(attest(private, STATEMENT))
    (tmp_path / "key.pem").write_text(public_half(private))
    payload = base64.b64decode(document["payload"])
    (tmp_path / "signed").write_bytes(pre_authentication_encoding(PAYLOAD_TYPE, payload))
    (tmp_path / "sig").write_bytes(base64.b64decode(document["signatures"][0]["sig"]))
    verify = "openssl pkeyutl -verify -pubin -inkey key.pem -rawin -in signed -sigfile sig"
    subprocess.run(verify.split(), cwd=tmp_path, check=True, capture_output=True)
    assert document["signatures"][0]["keyid"] == key_id(public_half(private))
    assert len(code_digest()) == 64


def test_the_libraries_of_dsse_and_in_toto_read_an_envelope() -> None:
    private, other = new_key(), new_key()
    envelope = Envelope.from_dict(json.loads(attest(private, STATEMENT)))
    envelope.verify([_key(private)], 1)
    with pytest.raises(VerificationError):
        envelope.verify([_key(other)], 1)
    statement = InTotoStatement.copy_from_pb(json_format.Parse(envelope.payload, in_toto.Statement()))
    statement.validate()
    assert statement.pb.predicate_type == SCORES
    assert {row.name: row.digest["sha256"] for row in statement.pb.subject} == STATEMENT.subjects
    envelope.payload = envelope.payload.replace(b"a" * 64, b"c" * 64)
    with pytest.raises(VerificationError):
        envelope.verify([_key(private)], 1)


def _key(private: bytes) -> SSlibKey:
    """The public half, under the id that envelopes have."""
    key = SSlibKey.from_crypto(load_pem_public_key(public_half(private).encode()))  # pyright: ignore[reportArgumentType]
    return SSlibKey(key_id(public_half(private)), key.keytype, key.scheme, key.keyval)


@pytest.mark.long
def test_cosign_verifies_that_an_envelope_is_about_a_file(tmp_path: Path) -> None:
    if shutil.which("cosign") is None:
        services.unavailable("cosign", "apt-get install cosign")
    weights, private = tmp_path / "adapter_model.safetensors", new_key()
    weights.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    (tmp_path / "key.pub.pem").write_text(public_half(private))
    (tmp_path / "1-scores.dsse.json").write_text(attest(private, Statement(SCORES, {weights.name: digest}, {})))
    verify = "cosign verify-blob-attestation --key key.pub.pem --signature 1-scores.dsse.json --insecure-ignore-tlog"
    command = [*verify.split(), "--type", SCORES, weights.name]
    assert b"Verified OK" in subprocess.run(command, cwd=tmp_path, check=True, capture_output=True).stderr
    weights.write_bytes(b"other weights")
    assert b"no matching subject" in subprocess.run(command, cwd=tmp_path, check=False, capture_output=True).stderr
