"""Signatures of releases: a Sigstore bundle, `model.sig`, over the digests of every other file, made with a local key.

The bundle is the one that model-signing writes and reads (a DSSE envelope around an in-toto statement that lists each
file with its sha256), so either side can be replaced by that tool. Since it signs digests, a registry can judge it
against a manifest without reading a byte of the weights.
"""

import hashlib
import json
from base64 import b64decode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from composer.findings import Finding, Severity
from registry.errors import Invalid, Refused, Unavailable, refuse_errors

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

SIGNATURE_FILE = "model.sig"
MAX_SIGNATURE_BYTES = 16_000_000
"""10,000 files, the most a release holds, take 6 MB."""

_PAYLOAD_TYPE = "application/vnd.in-toto+json"
_STATEMENT = "https://in-toto.io/Statement/v1"
_PREDICATE = "https://model_signing/signature/v1.0"
_CURVES = {"secp256r1": "SHA256", "secp384r1": "SHA384", "secp521r1": "SHA512"}


@dataclass(frozen=True, slots=True)
class Signed:
    """What a key has put its name to: `files` maps paths to sha256, exactly as they stand in the bundle."""

    fingerprint: str
    files: Mapping[str, str]


def fingerprint(public_key: str) -> str:
    """Of a public key in PEM: the sha256 of its canonical PEM, which a bundle names as its key's hint.

    Raises Invalid for what is no public key on P-256, P-384 or P-521.
    """
    return _fingerprint(_load(public_key))


def open_signature(
    content: bytes,
    public_keys: Sequence[str],
    next_step: str = "Sign it with --sign and a key that is trusted here.",
) -> Signed:
    """The content of a bundle, once one of the keys has proved to be the one that signed it.

    Raises Refused, with that next step, when none of them is, or when the signed text was changed; Invalid for what is
    no such bundle.
    """
    envelope = _envelope(content)
    keys = [_load(key) for key in public_keys]
    key = next((key for key in keys if _is_by(key, envelope)), None)
    if key is None:
        known = " or ".join(_fingerprint(one)[:12] for one in keys)
        raise Refused(
            "signature_unknown",
            f"{SIGNATURE_FILE} was made by another key than {known}, or was changed afterwards.",
            subject=SIGNATURE_FILE,
            next_step=next_step,
        )
    return Signed(_fingerprint(key), _files(envelope.payload))


def refuse_tampered(signed: Signed, files: Mapping[str, str]) -> None:
    """Raises Refused, naming every file, unless exactly the signed files are there with the signed digests.

    `files` maps paths to the sha256 of what is there; the signature itself is not among what it signs. A signed path
    is compared, never opened.
    """
    found = [
        Finding("file_tampered", Severity.ERROR, path[:400], f"{path[:400]!r} {what}.")
        for path, what in _differences(signed.files, files)
    ]
    refuse_errors(
        found, SIGNATURE_FILE, Refused, "Sign the release again if the change is yours; trust it no more if not."
    )


def doubt(content: bytes, files: Mapping[str, str]) -> Finding | None:
    """A warning about a bundle that lists other files than these, or cannot be read; None for one that may be theirs.

    For where no key is trusted yet: what is listed is anybody's text, so that this proves nothing. But whoever trusts
    the key later cannot use such a release.
    """
    try:
        differences = _differences(_files(_envelope(content).payload), files)
    except Invalid as error:
        why = error.detail
    else:
        if not differences:
            return None
        path, what = differences[0]
        more = f" ({len(differences) - 1} more like this)" if len(differences) > 1 else ""
        why = f"{SIGNATURE_FILE} is not a signature of these files: {path[:400]!r} {what}{more}."
    advice = "Sign them anew (--sign KEY.pem) or leave it out: who verifies this release refuses it."
    return Finding("signature_stale", Severity.WARNING, SIGNATURE_FILE, f"{why} {advice}")


def _differences(signed: Mapping[str, str], files: Mapping[str, str]) -> list[tuple[str, str]]:
    """The paths that are not as they were signed, and what is the matter with each."""
    found: list[tuple[str, str]] = []
    there = {path: sha256 for path, sha256 in files.items() if path != SIGNATURE_FILE}
    for path in sorted({*there, *signed}):
        own, expected = there.get(path), signed.get(path)
        if own != expected:
            what = "is signed, but not there" if own is None else "was changed after it was signed"
            found.append((path, "is not covered by the signature" if expected is None else what))
    return found


@dataclass(frozen=True, slots=True)
class _Envelope:
    payload: bytes
    signature: bytes


def _envelope(content: bytes) -> _Envelope:
    if len(content) > MAX_SIGNATURE_BYTES:
        raise _bad(f"it has more than {MAX_SIGNATURE_BYTES:,} bytes")
    try:
        bundle = cast("dict[str, Any]", json.loads(content))
        envelope = bundle["dsseEnvelope"]
        if envelope["payloadType"] != _PAYLOAD_TYPE:
            raise _bad(f"its payload is no {_PAYLOAD_TYPE}")
        (one,) = envelope["signatures"]
        return _Envelope(b64decode(envelope["payload"], validate=True), b64decode(one["sig"], validate=True))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _bad("it is no Sigstore bundle with one signature by a key") from error


def _files(payload: bytes) -> dict[str, str]:
    """The signed digests. Read only after the signature held: until then it is anybody's text."""
    try:
        statement = cast("dict[str, Any]", json.loads(payload))
        if (statement["_type"], statement["predicateType"]) != (_STATEMENT, _PREDICATE):
            raise _bad("it is no statement of model-signing 1.0 or later")
        resources = cast("list[dict[str, str]]", statement["predicate"]["resources"])
        if any(resource["algorithm"] != "sha256" for resource in resources):
            raise _bad("it lists other digests than sha256 of whole files")
        files = {str(resource["name"]): str(resource["digest"]) for resource in resources}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _bad("its statement has not the form of model-signing's") from error
    if len(files) != len(resources):
        raise _bad("it lists a file twice")
    return files


def _is_by(key: "EllipticCurvePublicKey", envelope: _Envelope) -> bool:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA

    signed = f"DSSEv1 {len(_PAYLOAD_TYPE)} {_PAYLOAD_TYPE} {len(envelope.payload)} ".encode() + envelope.payload
    try:
        key.verify(envelope.signature, signed, ECDSA(getattr(hashes, _CURVES[key.curve.name])()))
    except InvalidSignature:
        return False
    return True


def _load(public_key: str) -> "EllipticCurvePublicKey":
    try:
        from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
    except ModuleNotFoundError as error:
        raise Unavailable(
            "extra_missing", "Signatures need cryptography.", next_step="Install adaptory with its extra `sign`."
        ) from error
    try:
        key = load_pem_public_key(public_key.encode())
    except ValueError as error:
        raise _bad_key("it is no public key in PEM") from error
    if not isinstance(key, EllipticCurvePublicKey) or key.curve.name not in _CURVES:
        raise _bad_key("it is not on one of the curves P-256, P-384 and P-521")
    return key


def _fingerprint(key: "EllipticCurvePublicKey") -> str:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return hashlib.sha256(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def _bad(why: str) -> Invalid:
    return Invalid(
        "bad_signature", f"{SIGNATURE_FILE} cannot be read: {why}.", subject=SIGNATURE_FILE, next_step="Sign it again."
    )


def _bad_key(why: str) -> Invalid:
    return Invalid(
        "bad_key",
        f"A signing key cannot be used: {why}.",
        next_step="Make one: openssl ecparam -name prime256v1 -genkey -noout | openssl ec -pubout",
    )
