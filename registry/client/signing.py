"""Signing what is pushed and verifying what was pulled, with a key that lies on this machine. No network."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from composer.hashing import hash_file
from registry.client.push import LocalFile
from registry.errors import Invalid, Refused
from registry.manifest import ManifestFile
from registry.names import Digest
from registry.signing import MAX_SIGNATURE_BYTES, SIGNATURE_FILE, fingerprint, open_signature, refuse_tampered


def signed(files: Sequence[LocalFile], private_key: Path, aside: Path) -> list[LocalFile]:
    """The files and a new signature over all of them, which is written to the empty directory `aside`.

    The key is one of an elliptic curve, in PEM, without a password. Raises Invalid for another one, and Refused when a
    file is no longer what was collected.
    """
    kept = [file for file in files if file.manifest.path != SIGNATURE_FILE]
    target, release = aside / SIGNATURE_FILE, aside / "release"
    for file in kept:  # model-signing signs a whole directory, or names in the signature what it left out of one
        link = release / file.manifest.path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file.source.resolve())
    public_key = _sign(release, private_key, target)
    refuse_tampered(
        open_signature(target.read_bytes(), [public_key]), {file.manifest.path: file.manifest.sha256 for file in kept}
    )
    manifest = ManifestFile(SIGNATURE_FILE, target.stat().st_size, Digest(hash_file(target)))
    return [*kept, LocalFile(target, manifest)]


def _sign(release: Path, private_key: Path, target: Path) -> str:
    """Writes the signature; returns the public key in PEM."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
    from model_signing import hashing, signing

    hasher: Any = hashing.Config()  # the library's types are incomplete
    signer: Any = signing.Config()
    hasher.set_allow_symlinks(True).set_ignored_paths(paths=[SIGNATURE_FILE], ignore_git_paths=False)
    try:
        public_key = load_pem_private_key(private_key.read_bytes(), None).public_key()
        signer.use_elliptic_key_signer(private_key=private_key)
    except (ValueError, TypeError, AttributeError) as error:
        raise Invalid(
            "bad_key",
            f"{private_key} is no private key that can sign: {error}.",
            subject=str(private_key),
            next_step="Make one: openssl ecparam -name prime256v1 -genkey -noout -out KEY.pem",
        ) from error
    signer.set_hashing_config(hasher).sign(release, target)
    return public_key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def read_public_key(path: Path) -> str:
    """The PEM in a file, once it is certain that it can verify. Raises Invalid."""
    try:
        public_key = path.read_text("ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise Invalid(
            "bad_key",
            f"{path} cannot be read as a key in PEM: {error}.",
            subject=str(path),
            next_step="Name the file of the public key.",
        ) from error
    fingerprint(public_key)
    return public_key


def verify_files(directory: Path, files: Mapping[str, str], public_key: str) -> str:
    """Verifies files whose sha256 are known already (a pull has just checked them). Returns the key's fingerprint.

    Raises Refused when the release is unsigned, signed by another key, or when a file is not the signed one.
    """
    if SIGNATURE_FILE not in files:
        raise Refused(
            "unsigned",
            f"There is no {SIGNATURE_FILE}: nobody has signed these files.",
            subject=SIGNATURE_FILE,
            next_step="Ask for a signed release (adaptory push --sign KEY.pem).",
        )
    with (directory / SIGNATURE_FILE).open("rb") as file:
        content = file.read(MAX_SIGNATURE_BYTES + 1)
    signed = open_signature(content, [public_key])
    refuse_tampered(signed, files)
    return signed.fingerprint


def verify_directory(directory: Path, public_key: str) -> str:
    """Verifies every file below a directory, hidden ones too. Returns and raises like `verify_files`."""
    if not directory.is_dir():
        raise Invalid("missing_directory", f"{directory} is not a directory.", subject=str(directory))
    paths = [path for path in sorted(directory.rglob("*")) if not path.is_dir()]
    return verify_files(
        directory, {path.relative_to(directory).as_posix(): hash_file(path) for path in paths}, public_key
    )
