"""Signatures of releases: a Sigstore bundle over the release's name, base and commit and the digest of every file.

The bundle is one that model-signing reads (a DSSE envelope around an in-toto statement that lists each file with its
sha256), so that tool verifies the files too. `predicate.release`, which it ignores, names the release: the same files
under another name, number or base are another release, which is not signed. Bundles without it, such as model-signing's
own, cover the files alone. Since digests are signed, a registry checks a signature against a manifest without reading a
byte of the weights.
"""

import hashlib
import json
from base64 import b64decode, b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from composer.findings import Finding, Severity
from registry.errors import Invalid, Refused, Unavailable
from registry.errors.translation import refuse_errors
from registry.formats.attestations import PAYLOAD_TYPE, STATEMENT, pre_authentication_encoding

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

SIGNATURE_FILE = "model.sig"
MAX_SIGNATURE_BYTES = 16_000_000
"""A bundle over 2,000 files, the maximum of a release, has 1.2 MB."""
Covers = Literal["release", "files"]

_PREDICATE = "https://model_signing/signature/v1.0"
_BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_CURVES = {"secp256r1": "SHA256", "secp384r1": "SHA384", "secp521r1": "SHA512"}


@dataclass(frozen=True, slots=True)
class SignedRelease:
    """The identity that a signature binds its files to: NAMESPACE/NAME, the number, the base's digest, and the commit
    of the signed
    files (a release that carries its own `model.sig` has another commit, which covers that file too)."""

    repository: str
    version: str
    base: str
    commit: str

    def __str__(self) -> str:
        return f"{self.repository}:{self.version} on base {self.base[:12]}"


@dataclass(frozen=True, slots=True)
class Signed:
    """The signed content: `files` maps paths to sha256, exactly as in the bundle; `release` is None if only the files
    are signed."""

    fingerprint: str
    files: Mapping[str, str]
    release: SignedRelease | None

    @property
    def covers(self) -> Covers:
        return "release" if self.release else "files"


def sign(private_key: bytes, release: SignedRelease, files: Mapping[str, str]) -> bytes:
    """Makes a bundle over the release and its files (path -> sha256, without the signature) with a private key in PEM.
    Raises Invalid for a key that cannot sign."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA

    key = _load_private(private_key)
    resources = [{"name": path, "algorithm": "sha256", "digest": files[path]} for path in sorted(files)]
    root = hashlib.sha256(b"".join(bytes.fromhex(row["digest"]) for row in resources)).hexdigest()
    serialization = {
        "method": "files",
        "hash_type": "sha256",
        "allow_symlinks": True,
        "ignore_paths": [SIGNATURE_FILE],
    }
    statement = {
        "_type": STATEMENT,
        "subject": [{"name": f"{release.repository}:{release.version}", "digest": {"sha256": root}}],
        "predicateType": _PREDICATE,
        "predicate": {"serialization": serialization, "resources": resources, "release": asdict(release)},
    }
    payload = json.dumps(statement, ensure_ascii=False, separators=(",", ":")).encode()
    signature = key.sign(
        pre_authentication_encoding(PAYLOAD_TYPE, payload), ECDSA(getattr(hashes, _CURVES[key.curve.name])())
    )
    bundle = {
        "mediaType": _BUNDLE,
        "verificationMaterial": {"publicKey": {"hint": _fingerprint(key.public_key())}},
        "dsseEnvelope": {
            "payload": b64encode(payload).decode(),
            "payloadType": PAYLOAD_TYPE,
            "signatures": [{"sig": b64encode(signature).decode()}],
        },
    }
    return json.dumps(bundle).encode()


def public_key_of(pem: bytes) -> str:
    """The public key in PEM of a private or public one. Raises Invalid for anything else."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    private = b"PRIVATE KEY" in pem
    key = _load_private(pem).public_key() if private else _load(pem.decode("ascii", "replace"))
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def is_key_of(keys: Iterable[str], signed_by: str | None) -> bool:
    """Whether the fingerprint belongs to one of these public keys in PEM."""
    return signed_by in {fingerprint(key) for key in keys}


def fingerprint(public_key: str) -> str:
    """The fingerprint of a public key in PEM: the sha256 of its canonical PEM, which bundles contain as the key hint.
    Raises Invalid for anything but a public key on P-256, P-384 or P-521."""
    return _fingerprint(_load(public_key))


def own_fingerprint(path: Path) -> str:
    """The fingerprint of the key that `ADAPTORY_SIGNING_KEY` names. Raises as `read_key`."""
    return fingerprint(public_key_of(read_key(path)))


def read_key(path: Path) -> bytes:
    """Reads the PEM that `ADAPTORY_SIGNING_KEY` names. Raises Unavailable if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise Unavailable(
            "signing_key_missing",
            f"{path}, which ADAPTORY_SIGNING_KEY names, cannot be read: {error.strerror}.",
            subject=str(path),
        ) from error


def open_signature(
    content: bytes,
    public_keys: Sequence[str],
    next_step: str = "Sign it with --sign and a key that is trusted here.",
) -> Signed:
    """Verifies a bundle by one of the keys and returns its content. Raises Refused, with that next step, if none of
    them signed it or the signed text was changed, and Invalid for an invalid bundle."""
    envelope = _envelope(content)
    keys = [_load(key) for key in public_keys]
    key = next((key for key in keys if _is_by(key, envelope)), None)
    if key is None:
        known = " or ".join(_fingerprint(trusted)[:12] for trusted in keys)
        raise Refused(
            "signature_unknown",
            f"{SIGNATURE_FILE} was not made by {known}, or was changed afterwards.",
            subject=SIGNATURE_FILE,
            next_step=next_step,
        )
    return _statement(_fingerprint(key), envelope.payload)


def refuse_tampered(signed: Signed, files: Mapping[str, str]) -> None:
    """Raises Refused, naming every file, unless exactly the signed files exist with the signed digests. `files` maps
    paths to the sha256 of the actual files, without the signature. Signed paths are compared, never opened."""
    findings = [
        Finding("file_tampered", Severity.ERROR, path[:400], f"{path[:400]!r} {what}.")
        for path, what in _differences(signed.files, files)
    ]
    refuse_errors(findings, SIGNATURE_FILE, "Sign the release again if the change is yours; otherwise do not trust it.")


def refuse_other_release(signed: Signed, release: SignedRelease) -> None:
    """Raises Refused if the signature names another release; a signature of files alone names none."""
    if signed.release is None or signed.release == release:
        return
    theirs, own = asdict(signed.release), asdict(release)
    differs = [f"{name} {theirs[name][:200]!r}, not {own[name]!r}" for name in own if own[name] != theirs[name]]
    raise Refused(
        "signature_of_other_release",
        f"{SIGNATURE_FILE} belongs to another release: {', '.join(differs)}.",
        subject=f"{release.repository}:{release.version}",
        next_step="Ask its signer to sign this release with `adaptory sign REF`, or to push it with --sign KEY.pem.",
    )


def unverifiable_signature(content: bytes, files: Mapping[str, str]) -> tuple[Signed | None, list[Finding]]:
    """The content of an unverified bundle, and a warning if it lists other files than these or cannot be read.

    For namespaces without a trusted key: anyone may have written the content, so it proves nothing. But readers who
    trust the key later could not use a release with a wrong bundle.
    """
    try:
        signed = _statement("", _envelope(content).payload)
    except Invalid as error:
        return None, [_stale(error.detail)]
    differences = _differences(signed.files, files)
    if not differences:
        return signed, []
    path, what = differences[0]
    more = f" ({len(differences) - 1} more like this)" if len(differences) > 1 else ""
    return signed, [_stale(f"{SIGNATURE_FILE} is not a signature of these files: {path[:400]!r} {what}{more}.")]


def _stale(why: str) -> Finding:
    advice = "Sign again (--sign KEY.pem) or leave it out: verification of this release would fail."
    return Finding("signature_stale", Severity.WARNING, SIGNATURE_FILE, f"{why} {advice}")


def _differences(signed: Mapping[str, str], files: Mapping[str, str]) -> list[tuple[str, str]]:
    """The paths that differ from the signed ones, and how."""
    differences: list[tuple[str, str]] = []
    there = {path: sha256 for path, sha256 in files.items() if path != SIGNATURE_FILE}
    for path in sorted({*there, *signed}):
        own, expected = there.get(path), signed.get(path)
        if own != expected:
            what = "is signed, but missing" if own is None else "was changed after it was signed"
            differences.append((path, "is not covered by the signature" if expected is None else what))
    return differences


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
        if envelope["payloadType"] != PAYLOAD_TYPE:
            raise _bad(f"its payload is not {PAYLOAD_TYPE}")
        (one,) = envelope["signatures"]
        return _Envelope(b64decode(envelope["payload"], validate=True), b64decode(one["sig"], validate=True))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _bad("it is not a Sigstore bundle with one signature by a key") from error


def _statement(fingerprint: str, payload: bytes) -> Signed:
    """Parses the signed statement. Do not trust it before the signature is verified."""
    try:
        statement = cast("dict[str, Any]", json.loads(payload))
        if (statement["_type"], statement["predicateType"]) != (STATEMENT, _PREDICATE):
            raise _bad("it is not a statement of model-signing 1.0 or later")
        resources = cast("list[dict[str, str]]", statement["predicate"]["resources"])
        if any(resource["algorithm"] != "sha256" for resource in resources):
            raise _bad("it lists digests other than the sha256 of complete files")
        files = {str(resource["name"]): str(resource["digest"]) for resource in resources}
        named = cast("dict[str, object] | None", statement["predicate"].get("release"))
        release = None if named is None else SignedRelease(**{name: str(value) for name, value in named.items()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _bad("its statement does not have model-signing's form") from error
    if len(files) != len(resources):
        raise _bad("it lists a file twice")
    return Signed(fingerprint, files, release)


def _is_by(key: "EllipticCurvePublicKey", envelope: _Envelope) -> bool:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA

    try:
        signed = pre_authentication_encoding(PAYLOAD_TYPE, envelope.payload)
        key.verify(envelope.signature, signed, ECDSA(getattr(hashes, _CURVES[key.curve.name])()))
    except InvalidSignature:
        return False
    return True


def _load_private(private_key: bytes) -> "EllipticCurvePrivateKey":
    try:
        from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
    except ModuleNotFoundError as error:
        raise _extra_missing() from error
    try:
        key = load_pem_private_key(private_key, None)
    except (ValueError, TypeError) as error:
        raise _bad_key("it is not a private key in PEM without a password") from error
    if not isinstance(key, EllipticCurvePrivateKey) or key.curve.name not in _CURVES:
        raise _bad_key("it is not on one of the curves P-256, P-384 and P-521")
    return key


def _extra_missing() -> Unavailable:
    return Unavailable(
        "extra_missing", "Signatures need cryptography.", next_step="Install adaptory with its extra `sign`."
    )


def _load(public_key: str) -> "EllipticCurvePublicKey":
    try:
        from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
    except ModuleNotFoundError as error:
        raise _extra_missing() from error
    try:
        key = load_pem_public_key(public_key.encode())
    except ValueError as error:
        raise _bad_key("it is not a public key in PEM") from error
    if not isinstance(key, EllipticCurvePublicKey) or key.curve.name not in _CURVES:
        raise _bad_key("it is not on one of the curves P-256, P-384 and P-521")
    return key


def _fingerprint(key: "EllipticCurvePublicKey") -> str:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return hashlib.sha256(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def _bad(why: str) -> Invalid:
    return Invalid("bad_signature", f"{SIGNATURE_FILE} cannot be read: {why}.", subject=SIGNATURE_FILE)


def _bad_key(why: str) -> Invalid:
    return Invalid(
        "bad_key",
        f"A signing key cannot be used: {why}.",
        next_step="Create one: openssl ecparam -name prime256v1 -genkey -noout -out KEY.pem (openssl ec -pubout).",
    )
