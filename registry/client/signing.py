"""Signing what is pushed and verifying what was pulled, with a key that lies on this machine."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from composer.hashing import hash_file
from registry.client.api import Api, Json, line_path, release_path
from registry.client.parallel import PAUSES_S, patiently
from registry.client.push import LocalFile
from registry.client.selection import refuse_no_file
from registry.errors import Invalid, NotFound, Refused
from registry.manifest import ManifestFile
from registry.names import Digest, Reference
from registry.signing import MAX_SIGNATURE_BYTES, SIGNATURE_FILE, fingerprint, open_signature, refuse_tampered


def signed(
    files: Sequence[LocalFile], private_key: Path, aside: Path, published: Iterable[bytes] = ()
) -> list[LocalFile]:
    """The files and a signature over all of them, which is written to the empty directory `aside`.

    It is the first of the `published` ones that this key made over these very files, else a new one: ECDSA is
    randomised, so signing anew would make other content of the same files. The key is one of an elliptic curve, in PEM,
    without a password. Raises Invalid for another one, and Refused when a file is no longer what was collected.
    """
    kept = [file for file in files if file.manifest.path != SIGNATURE_FILE]
    digests = {file.manifest.path: file.manifest.sha256 for file in kept}
    signer, public_key = _open_key(private_key)
    target = aside / SIGNATURE_FILE
    same = next((content for content in published if _holds(content, public_key, digests)), None)
    if same is not None:
        target.write_bytes(same)
    else:
        _sign(signer, kept, aside / "release", target)
        refuse_tampered(open_signature(target.read_bytes(), [public_key]), digests)
    manifest = ManifestFile(SIGNATURE_FILE, target.stat().st_size, Digest(hash_file(target)))
    return [*kept, LocalFile(target, manifest)]


def published_signatures(api: Api, target: Reference, files: Sequence[LocalFile]) -> Iterator[bytes]:
    """The signatures, by whomever, of the adapter's releases with the same files: of the one that `target` names, or of
    any, the highest version first, where a bump will find the version."""
    digests = {file.manifest.path: file.manifest.sha256 for file in files if file.manifest.path != SIGNATURE_FILE}
    for release in _releases(api, target):
        there = {row["path"]: row["sha256"] for row in release["files"]}
        if there.pop(SIGNATURE_FILE, None) is not None and there == digests:
            yield patiently(partial(_signature_of, api, release), iter(PAUSES_S))


def _releases(api: Api, target: Reference) -> Iterator[Json]:
    path = f"{line_path(target.repository)}/releases"
    try:
        if target.version:
            yield api.get(f"{path}/{target.version}")
        else:
            yield from api.pages(path)
    except NotFound:  # it is the first of its name
        return


def _signature_of(api: Api, release: Json) -> bytes:
    """No more than a signature may have, and a byte that shows it."""
    content = bytearray()
    with api.stream(f"{release_path(release)}/files/{SIGNATURE_FILE}") as stream:
        for chunk in stream.chunks:
            content += chunk
            if len(content) > MAX_SIGNATURE_BYTES:
                break
    return bytes(content[: MAX_SIGNATURE_BYTES + 1])


def _holds(content: bytes, public_key: str, digests: Mapping[str, str]) -> bool:
    try:
        refuse_tampered(open_signature(content, [public_key]), digests)
    except (Refused, Invalid):  # another key's, or no signature at all: not ours to judge
        return False
    return True


def _sign(signer: Any, files: Sequence[LocalFile], release: Path, target: Path) -> None:
    """model-signing signs a whole directory, or names in the signature what it left out of one: `release` is made so
    that it has these files and no others."""
    from model_signing import hashing

    for file in files:
        link = release / file.manifest.path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file.source.resolve())
    hasher: Any = hashing.Config()  # the library's types are incomplete
    hasher.set_allow_symlinks(True).set_ignored_paths(paths=[SIGNATURE_FILE], ignore_git_paths=False)
    signer.set_hashing_config(hasher).sign(release, target)


def _open_key(private_key: Path) -> tuple[Any, str]:
    """What signs with the key, and its public key in PEM."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
    from model_signing import signing

    signer: Any = signing.Config()
    try:
        public_key = load_pem_private_key(private_key.read_bytes(), None).public_key()
        signer.use_elliptic_key_signer(private_key=private_key)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise Invalid(
            "bad_key",
            f"{private_key} is no private key that can sign: {why}.",
            subject=str(private_key),
            next_step="Make one: openssl ecparam -name prime256v1 -genkey -noout -out KEY.pem",
        ) from error
    return signer, public_key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def read_public_key(path: Path) -> str:
    """The PEM in a file, once it is certain that it can verify. Raises Invalid."""
    try:
        public_key = path.read_text("ascii")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise Invalid(
            "bad_key",
            f"{path} cannot be read as a key in PEM: {why}.",
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
    signed = open_signature(
        content,
        [public_key],
        "Verify it with the public key of who signed it, which they tell you; if this is that key, trust it no more.",
    )
    refuse_tampered(signed, files)
    return signed.fingerprint


def verify_directory(directory: Path, public_key: str) -> str:
    """Verifies every file below a directory, hidden ones too. Returns and raises like `verify_files`.

    Raises Invalid for what is no file: behind a link to a directory there may be more than was signed.
    """
    if not directory.is_dir():
        raise Invalid(
            "missing_directory",
            f"{directory} is not a directory.",
            subject=str(directory),
            next_step="Name the directory that was signed or pulled.",
        )
    paths = [path for path in sorted(directory.rglob("*")) if path.is_symlink() or not path.is_dir()]
    for path in paths:
        refuse_no_file(path, path.relative_to(directory))
    return verify_files(
        directory, {path.relative_to(directory).as_posix(): hash_file(path) for path in paths}, public_key
    )
