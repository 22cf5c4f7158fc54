"""Signs pushed releases and verifies pulled ones, with a local key."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from composer.formats.checkpoints.hashing import hash_file
from registry.client.api import Api, line_path, refuse_other_answer, untrusted
from registry.client.push import PushedFile, ReleaseRequest, push, send
from registry.client.retries import Progress, pauses, with_retries
from registry.client.selection import refuse_no_file
from registry.errors import Invalid, NotFound, Refused, RegistryError
from registry.formats.manifest import ManifestFile, canonical_manifest, commit_id
from registry.formats.references import Digest, Reference, RepositoryName, parse_digest, parse_version
from registry.formats.signatures import (
    MAX_SIGNATURE_BYTES,
    SIGNATURE_FILE,
    Signed,
    SignedRelease,
    fingerprint,
    open_signature,
    public_key_of,
    refuse_other_release,
    refuse_tampered,
    sign,
)
from registry.wire.catalog import NextOut, PublishedOut, ReleaseOut, SignaturesOut
from registry.wire.search import AnyRelease

_OTHER_KEY = "Get the signer's public key from them and verify with it. If this is that key, do not trust the release."


@dataclass(frozen=True, slots=True)
class Publication:
    """A release to publish: the repository, the kind (adapter or model), and the request without its files."""

    target: RepositoryName
    kind: str
    request: ReleaseRequest


def push_signed(
    api: Api, files: Sequence[PushedFile], wanted: Publication, key: Path, staging: Path, progress: Progress
) -> tuple[PublishedOut, int]:
    """Pushes with a signature over the files and the release, returning as `push` does. A bump determines the version
    first, which requires the files to be in the store."""
    read_private_key(key)  # before anything is sent
    if wanted.request["version"]:
        signed = sign_files(api, files, wanted, key, staging)
        return push(api, signed, wanted.target, wanted.kind, wanted.request, progress)
    sent = send(api, wanted.target.namespace, files, progress)
    signed = sign_files(api, files, wanted, key, staging)
    published, further = push(api, signed, wanted.target, wanted.kind, wanted.request, lambda _count: None)
    return published, sent + further


def sign_files(
    api: Api, files: Sequence[PushedFile], wanted: Publication, key: Path, staging: Path
) -> list[PushedFile]:
    """Adds a signature over the files and the release to the files; writes it to the directory `staging`.

    Resolves a bump to a version in the request; the files must then be in the store already. A retry reuses this key's
    earlier signature: ECDSA is randomised, so a new one would be different content. Raises Invalid for a key that
    cannot sign.
    """
    request, private_key = wanted.request, read_private_key(key)
    kept = [file for file in files if file.manifest.path != SIGNATURE_FILE]
    digests = {file.manifest.path: file.manifest.sha256 for file in kept}
    base = api.base(request["base"]).digest
    again = _released(api, wanted, digests, base, public_key_of(private_key))
    if again is not None:
        request["version"], content = again
    else:
        request["version"] = request["version"] or _next_version(api, wanted, kept)
        commit = commit_id(canonical_manifest([file.manifest for file in kept]))
        content = sign(private_key, SignedRelease(str(wanted.target), request["version"], base, commit), digests)
    request["bump"] = None
    signature = staging / SIGNATURE_FILE
    signature.write_bytes(content)
    manifest = ManifestFile(SIGNATURE_FILE, len(content), Digest(hash_file(signature)))
    return [*kept, PushedFile(signature, manifest)]


def _next_version(api: Api, wanted: Publication, files: Sequence[PushedFile]) -> str:
    rows = [asdict(file.manifest) for file in files]
    body = {"bump": wanted.request["bump"], "base": wanted.request["base"], "files": rows}
    path = f"{line_path(wanted.target, wanted.kind)}/next-version"
    return with_retries(lambda: api.post(path, body, NextOut), pauses()).version


def _released(
    api: Api, wanted: Publication, digests: Mapping[str, str], base: str, public_key: str
) -> tuple[str, bytes] | None:
    """The version and signature of an existing release with these files and base, signed by this key: the release that
    the request names or, for a bump, the highest stable one, which such a push would repeat."""
    for release in _releases(api, wanted):
        there = _digests(release)
        if there.pop(SIGNATURE_FILE, None) is None or there != digests or release.base.digest != base:
            continue
        content = with_retries(partial(_signature_of, api, release), pauses())
        if _holds(content, public_key, release):
            return release.version, content
    return None


def _releases(api: Api, wanted: Publication) -> Iterator[ReleaseOut]:
    path, version = f"{line_path(wanted.target, wanted.kind)}/releases", wanted.request["version"]
    try:
        if version:
            yield api.get(f"{path}/{version}", ReleaseOut)
            return
        releases = api.pages(path, ReleaseOut)
        stable = (release for release in releases if not release.yanked and parse_version(release.version).stable)
        yield from islice(stable, 1)
    except NotFound:  # the first release of the repository
        return


def _signature_of(api: Api, release: ReleaseOut) -> bytes:
    """The signature's content, up to one byte beyond the maximum."""
    content = bytearray()
    with api.stream(f"{release.path}/files/{SIGNATURE_FILE}") as stream:
        for chunk in stream.chunks:
            content += chunk
            if len(content) > MAX_SIGNATURE_BYTES:
                break
    return bytes(content[: MAX_SIGNATURE_BYTES + 1])


def _holds(content: bytes, public_key: str, release: AnyRelease) -> bool:
    try:
        signed = open_signature(content, [public_key])
        refuse_tampered(signed, _digests(release))
        refuse_other_release(signed, bound_release(release))
    except (Refused, Invalid):  # another key's, or not a signature
        return False
    return True


def read_private_key(path: Path) -> bytes:
    """Reads a PEM private key. Raises Invalid if it cannot sign."""
    try:
        private_key = path.read_bytes()
        if b"PRIVATE KEY" in private_key:
            public_key_of(private_key)
            return private_key
        why = "it contains no private key in PEM"
    except OSError as error:
        why = str(error.strerror)
    except Invalid as error:
        why = error.detail.removeprefix("A signing key cannot be used: ").removesuffix(".")
    raise Invalid(
        "bad_key",
        f"{path} cannot sign: {why}.",
        subject=str(path),
        next_step="Create one: openssl ecparam -name prime256v1 -genkey -noout -out KEY.pem",
    )


def bound_release(release: AnyRelease) -> SignedRelease:
    """The statement that a signature of this release must make. Raises Invalid if the registry's commit is not that of
    the files."""
    files = [ManifestFile(row.path, row.size_bytes, parse_digest(row.sha256)) for row in release.files]
    if commit_id(canonical_manifest(files)) != release.commit:
        raise untrusted("commit_differs", f"the commit of {release.name} is not that of its files")
    kept = [file for file in files if file.path != SIGNATURE_FILE]
    commit = commit_id(canonical_manifest(kept))
    return SignedRelease(release.repository, release.version, release.base.digest, commit)


def sign_release(api: Api, release: AnyRelease, key: Path) -> tuple[ReleaseOut, str]:
    """Signs a published release. Returns the updated release and the key's fingerprint. Raises Invalid for a key that
    cannot sign."""
    bound = bound_release(release)
    files = {path: sha256 for path, sha256 in _digests(release).items() if path != SIGNATURE_FILE}
    private = read_private_key(key)
    signed = api.post(f"{release.path}/signatures", {"bundle": sign(private, bound, files).decode()}, ReleaseOut)
    return signed, fingerprint(public_key_of(private))


def _digests(release: AnyRelease) -> dict[str, str]:
    return {row.path: row.sha256 for row in release.files}


def read_public_key(path: Path) -> str:
    """Reads a PEM public key. Raises Invalid if it cannot verify."""
    try:
        public_key = path.read_text("ascii")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise Invalid(
            "bad_key",
            f"{path} cannot be read as a PEM key: {why}.",
            subject=str(path),
            next_step="Name the public key's file.",
        ) from error
    fingerprint(public_key)
    return public_key


def verify_release(api: Api, release: AnyRelease, asked: Reference, directory: Path, public_key: str) -> Signed:
    """Verifies a release whose files in `directory` were just checked against their SHA-256.

    Uses the signature among its files or one added later; prefers one that binds the release. Raises Refused if it is
    unsigned or signed by another key, if a file differs from the signed one, and for a signature of another repository,
    version or base.
    """
    refuse_other_answer(asked, release)
    expected, digests = bound_release(release), _digests(release)
    bundles = [_read_signature(directory)] if SIGNATURE_FILE in digests else []
    bundles += _later_signatures(api, release)
    signed = _best(bundles, public_key)
    refuse_tampered(signed, digests)
    refuse_other_release(signed, expected)
    return signed


def _later_signatures(api: Api, release: AnyRelease) -> list[bytes]:
    try:
        document = api.get(f"{release.path}/signatures", SignaturesOut)
    except NotFound:  # an older registry without later signatures
        return []
    return [row.bundle.encode() for row in document.signatures]


def _best(bundles: Sequence[bytes], public_key: str) -> Signed:
    """The signature by this key among the bundles; one of the release before one of files only."""
    if not bundles:
        raise Refused(
            "unsigned",
            f"These files are not signed: {SIGNATURE_FILE} is missing.",
            subject=SIGNATURE_FILE,
            next_step="Ask its publisher to sign it (`adaptory sign REF --key KEY.pem`), or use it without --verify.",
        )
    opened: list[Signed] = []
    refusals: list[RegistryError] = []
    for bundle in bundles:
        try:
            opened.append(open_signature(bundle, [public_key], _OTHER_KEY))
        except (Refused, Invalid) as error:
            refusals.append(error)
    if not opened:
        raise refusals[-1]
    return max(opened, key=lambda signed: signed.release is not None)


def _read_signature(directory: Path) -> bytes:
    with (directory / SIGNATURE_FILE).open("rb") as file:
        return file.read(MAX_SIGNATURE_BYTES + 1)


def verify_directory(directory: Path, public_key: str) -> Signed:
    """Verifies every file below a directory, also hidden ones, against its signature; which release it is, a directory
    cannot prove. Raises Refused as `verify_release` does.

    Raises Invalid for anything but files: a link to a directory could lead to unsigned files.
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
    digests = {path.relative_to(directory).as_posix(): hash_file(path) for path in paths}
    signed = _best([_read_signature(directory)] if SIGNATURE_FILE in digests else [], public_key)
    refuse_tampered(signed, digests)
    return signed
