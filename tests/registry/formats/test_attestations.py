"""Attestations: the encoding that DSSE signs, and envelopes that other tools read."""

import base64
import json
import subprocess
from pathlib import Path

import pytest

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
