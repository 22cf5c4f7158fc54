"""Attestations: in-toto statements in DSSE envelopes, signed with the Ed25519 key of the worker that measured.

A statement names its subjects by the sha256 of their content, such as weights, base and suite, and its predicate says
what was measured of them. It proves that the key's worker said so and that nothing was changed since; it does not prove
that the worker's host is honest.
"""

import hashlib
import json
from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from registry.errors import Invalid, Refused, Unavailable

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT = "https://in-toto.io/Statement/v1"
SCORES = "https://adaptory/scores/v1"
COMPOSITION = "https://adaptory/composition/v1"
EVIDENCE = "https://adaptory/evidence/v1"
MAX_ENVELOPE_BYTES = 8 << 20
_CODE = ("registry", "composer")


@dataclass(frozen=True, slots=True)
class Statement:
    """The content of an attestation: `subjects` maps names to the sha256 of their content, and `predicate` is JSON."""

    predicate_type: str
    subjects: Mapping[str, str]
    predicate: Mapping[str, Any]


def pre_authentication_encoding(payload_type: str, payload: bytes) -> bytes:
    """The bytes that a key signs in DSSE."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def new_key() -> bytes:
    """Makes a private key, as PEM. Raises Unavailable without cryptography."""
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key = _ed25519().generate()
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def public_half(private_key: bytes) -> str:
    """The public key in PEM of a private one. Raises Invalid for anything but an Ed25519 key without a password."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    key = _private(private_key).public_key()
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def key_id(public_key: str) -> str:
    """The sha256 of a public key in DER, in hex. Raises Invalid for anything but an Ed25519 key in PEM."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    der = _public(public_key).public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def attest(private_key: bytes, statement: Statement) -> str:
    """Signs the statement. Returns the envelope as JSON."""
    document = {
        "_type": STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": digest}} for name, digest in statement.subjects.items()],
        "predicateType": statement.predicate_type,
        "predicate": statement.predicate,
    }
    payload = json.dumps(document, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    signature = _private(private_key).sign(pre_authentication_encoding(PAYLOAD_TYPE, payload))
    signed_by = {"keyid": key_id(public_half(private_key)), "sig": b64encode(signature).decode()}
    return json.dumps({"payload": b64encode(payload).decode(), "payloadType": PAYLOAD_TYPE, "signatures": [signed_by]})


def open_attestation(envelope: str, public_key: str) -> Statement:
    """Verifies an envelope and returns its statement. Raises Refused unless the key signed exactly this text, and
    Invalid for anything but a DSSE envelope around an in-toto statement."""
    from cryptography.exceptions import InvalidSignature

    payload, signature = _parts(envelope)
    try:
        _public(public_key).verify(signature, pre_authentication_encoding(PAYLOAD_TYPE, payload))
    except InvalidSignature as error:
        raise Refused(
            "attestation_untrusted",
            f"An attestation was not made by the key {key_id(public_key)[:12]}, or was changed afterwards.",
            subject=key_id(public_key)[:12],
        ) from error
    return _statement(payload)


def unverified(envelope: str) -> Statement:
    """Reads a statement that somebody else has verified. Raises Invalid as `open_attestation` does."""
    return _statement(_parts(envelope)[0])


@cache
def code_digest() -> str:
    """The sha256 of this version's own code: of each Python file's path and content, in order."""
    root, digest = Path(__file__).parents[2], hashlib.sha256()
    for path in sorted(path for package in _CODE for path in (root / package).rglob("*.py")):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{content}  {path.relative_to(root).as_posix()}\n".encode())
    return digest.hexdigest()


def _parts(envelope: str) -> tuple[bytes, bytes]:
    """The payload and the one signature of an envelope."""
    if len(envelope) > MAX_ENVELOPE_BYTES:
        raise _bad(f"it has more than {MAX_ENVELOPE_BYTES:,} bytes")
    try:
        document = cast("dict[str, Any]", json.loads(envelope))
        if document["payloadType"] != PAYLOAD_TYPE:
            raise _bad(f"its payload is not {PAYLOAD_TYPE}")
        (one,) = document["signatures"]
        return b64decode(document["payload"], validate=True), b64decode(one["sig"], validate=True)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _bad("it is not a DSSE envelope with one signature") from error


def _statement(payload: bytes) -> Statement:
    try:
        document = cast("dict[str, Any]", json.loads(payload))
        if document["_type"] != STATEMENT:
            raise _bad(f"it is not a {STATEMENT}")
        subjects = {str(row["name"]): str(row["digest"]["sha256"]) for row in document["subject"]}
        statement = Statement(str(document["predicateType"]), subjects, dict(document["predicate"]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _bad("its payload is not an in-toto statement") from error
    if len(subjects) != len(document["subject"]):
        raise _bad("it names a subject twice")
    return statement


def _ed25519() -> "type[Ed25519PrivateKey]":
    try:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    except ModuleNotFoundError as error:
        raise Unavailable(
            "extra_missing", "Attestations need cryptography.", next_step="Install adaptory with its extra `sign`."
        ) from error
    return Ed25519PrivateKey


def _private(private_key: bytes) -> "Ed25519PrivateKey":
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    kind = _ed25519()
    try:
        key = load_pem_private_key(private_key, None)
    except (ValueError, TypeError) as error:
        raise _bad_key("it is not a private key in PEM without a password") from error
    if not isinstance(key, kind):
        raise _bad_key("it is not an Ed25519 key")
    return key


def _public(public_key: str) -> "Ed25519PublicKey":
    _ed25519()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(public_key.encode())
    except ValueError as error:
        raise _bad_key("it is not a public key in PEM") from error
    if not isinstance(key, Ed25519PublicKey):
        raise _bad_key("it is not an Ed25519 key")
    return key


def _bad(why: str) -> Invalid:
    return Invalid("bad_attestation", f"An attestation cannot be read: {why}.")


def _bad_key(why: str) -> Invalid:
    return Invalid("bad_worker_key", f"The key cannot be used: {why}.")
