"""Signing what is pushed and verifying what was pulled, with a key that lies on this machine."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from composer.formats.checkpoints.hashing import hash_file
from registry.client.api import Api, Json, line_path, refuse_other_answer, release_path, understood, untrusted
from registry.client.push import LocalFile, push, send
from registry.client.retries import PAUSES_S, Progress, with_retries
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

_OTHER_KEY = (
    "Verify it with the public key of who signed it, which they tell you; if this is that key, trust it no more."
)


@dataclass(frozen=True, slots=True)
class Publication:
    """What is to be published: in which repository, as an adapter or a model, and the request without its files."""

    target: RepositoryName
    kind: str
    request: Json


def push_signed(
    api: Api, files: Sequence[LocalFile], wanted: Publication, key: Path, staging: Path, progress: Progress
) -> Json:
    """`push`, with a signature over the files and the release. A bump finds the number first, for which the files have
    to be in the store."""
    read_private_key(key)  # before anything is sent
    if wanted.request["version"]:
        signed = sign_files(api, files, wanted, key, staging)
        return push(api, signed, wanted.target, wanted.kind, wanted.request, progress)
    sent = send(api, wanted.target.namespace, files, progress)
    signed = sign_files(api, files, wanted, key, staging)
    published = push(api, signed, wanted.target, wanted.kind, wanted.request, lambda _count: None)
    return {**published, "sent": published["sent"] + sent}


def sign_files(api: Api, files: Sequence[LocalFile], wanted: Publication, key: Path, staging: Path) -> list[LocalFile]:
    """The files and a signature over them and the release that they are to be, written to the directory `staging`.

    Fixes the request's version where a bump names it: then the files have to be in the store already. A retry takes the
    signature that this key made of the release then: ECDSA is randomised, so a new one would be other content. Raises
    Invalid for a key that cannot sign.
    """
    request, private_key = wanted.request, read_private_key(key)
    kept = [file for file in files if file.manifest.path != SIGNATURE_FILE]
    digests = {file.manifest.path: file.manifest.sha256 for file in kept}
    base = api.base(request["base"])["digest"]
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
    return [*kept, LocalFile(signature, manifest)]


def _next_version(api: Api, wanted: Publication, files: Sequence[LocalFile]) -> str:
    rows = [asdict(file.manifest) for file in files]
    body = {"bump": wanted.request["bump"], "base": wanted.request["base"], "files": rows}
    path = f"{line_path(wanted.target, wanted.kind)}/next-version"
    return with_retries(lambda: api.post(path, body), iter(PAUSES_S))["version"]


def _released(
    api: Api, wanted: Publication, digests: Mapping[str, str], base: str, public_key: str
) -> tuple[str, bytes] | None:
    """The version that has these files for this base, with this key's signature among them: of the release that the
    request names, or where a bump names it of the highest stable one, which is what such a push would repeat."""
    for release in _releases(api, wanted):
        there = {row["path"]: row["sha256"] for row in release["files"]}
        if there.pop(SIGNATURE_FILE, None) is None or there != digests or release["base"]["digest"] != base:
            continue
        content = with_retries(partial(_signature_of, api, release), iter(PAUSES_S))
        if _holds(content, public_key, release):
            return str(release["version"]), content
    return None


def _releases(api: Api, wanted: Publication) -> Iterator[Json]:
    path, version = f"{line_path(wanted.target, wanted.kind)}/releases", wanted.request["version"]
    try:
        if version:
            yield api.get(f"{path}/{version}")
            return
        stable = (one for one in api.pages(path) if not one["yanked"] and parse_version(one["version"]).stable)
        yield from islice(stable, 1)
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


def _holds(content: bytes, public_key: str, release: Json) -> bool:
    try:
        signed = open_signature(content, [public_key])
        refuse_tampered(signed, _digests(release))
        refuse_other_release(signed, bound_release(release))
    except (Refused, Invalid):  # another key's, or no signature at all: not ours to judge
        return False
    return True


def read_private_key(path: Path) -> bytes:
    """The PEM in a file, once it is certain that it can sign. Raises Invalid."""
    try:
        private_key = path.read_bytes()
        if b"PRIVATE KEY" in private_key:
            public_key_of(private_key)
            return private_key
        why = "it is not a private key in PEM"
    except OSError as error:
        why = str(error.strerror)
    except Invalid as error:
        why = error.detail.removeprefix("A signing key cannot be used: ").removesuffix(".")
    raise Invalid(
        "bad_key",
        f"{path} is no private key that can sign: {why}.",
        subject=str(path),
        next_step="Make one: openssl ecparam -name prime256v1 -genkey -noout -out KEY.pem",
    )


def bound_release(release: Json) -> SignedRelease:
    """What a signature of the release that a registry answered has to say. Raises Invalid where its commit is not that
    of its files."""
    with understood():
        files = [ManifestFile(row["path"], row["size_bytes"], parse_digest(row["sha256"])) for row in release["files"]]
        repository, version, base = release["repository"], release["version"], release["base"]["digest"]
        claimed = release["commit"]
    if commit_id(canonical_manifest(files)) != claimed:
        raise untrusted("commit_differs", f"the commit of {repository}:{version} is not that of its files")
    kept = [file for file in files if file.path != SIGNATURE_FILE]
    return SignedRelease(repository, version, base, commit_id(canonical_manifest(kept)))


def sign_release(api: Api, release: Json, key: Path) -> tuple[Json, str]:
    """Signs a release that is out. The release as it is then, and the key's fingerprint. Raises Invalid for a key that
    cannot sign."""
    bound = bound_release(release)
    files = {path: sha256 for path, sha256 in _digests(release).items() if path != SIGNATURE_FILE}
    private = read_private_key(key)
    signed = api.post(f"{release_path(release)}/signatures", {"bundle": sign(private, bound, files).decode()})
    return signed, fingerprint(public_key_of(private))


def _digests(release: Json) -> dict[str, str]:
    return {row["path"]: row["sha256"] for row in release["files"]}


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


def verify_release(api: Api, release: Json, asked: Reference, directory: Path, public_key: str) -> Signed:
    """Verifies a release whose files in `directory` were just checked against their sha256.

    By the signature among its files, or one that came after it; one that binds the release is preferred. Raises Refused
    when it is unsigned, signed by another key, when a file is not the signed one, and for a signature of another
    repository, version or base.
    """
    refuse_other_answer(asked, release)
    expected, digests = bound_release(release), _digests(release)
    bundles = [_read_signature(directory)] if SIGNATURE_FILE in digests else []
    bundles += _later_signatures(api, release)
    signed = _best(bundles, public_key)
    refuse_tampered(signed, digests)
    refuse_other_release(signed, expected)
    return signed


def _later_signatures(api: Api, release: Json) -> list[bytes]:
    try:
        found = api.get(f"{release_path(release)}/signatures")
    except NotFound:  # a registry of before there were any
        return []
    with understood():
        return [row["bundle"].encode() for row in found["signatures"]]


def _best(bundles: Sequence[bytes], public_key: str) -> Signed:
    """What the key has signed of several bundles, the release before files alone."""
    if not bundles:
        raise Refused(
            "unsigned",
            f"There is no {SIGNATURE_FILE}: nobody has signed these files.",
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
    """Verifies every file below a directory, hidden ones too, by the signature there; which release it is, nobody can
    tell of a directory. Raises Refused as `verify_release` does.

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
    digests = {path.relative_to(directory).as_posix(): hash_file(path) for path in paths}
    signed = _best([_read_signature(directory)] if SIGNATURE_FILE in digests else [], public_key)
    refuse_tampered(signed, digests)
    return signed
