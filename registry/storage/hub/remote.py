"""A Hugging Face Hub: the contents of a revision, its files, and the commit and tag of an export.

Only the hub that HF_ENDPOINT names (https://huggingface.co by default) gets a token: HF_TOKEN, or the one that
`hf auth login` has stored. Any other endpoint is asked without one, and no hub gets a token of Adaptory.
"""

import hashlib
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from composer.formats.checkpoints.hashing import hash_file
from registry.errors import Conflict, Invalid, NotAllowed, Unavailable, Usage
from registry.formats.addresses import HubAddress
from registry.storage.hub.errors import printed, translate_hub_errors
from registry.storage.hub.limits import limited

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Content = bytes | Path


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file in a hub's listing, identified by its sha256 or, for a small file in git, by the sha1 of its blob."""

    path: str
    size_bytes: int
    sha256: str | None
    git_blob: str

    def holds(self, content: Content) -> bool:
        """Whether the file has this content."""
        if self.sha256 is not None:
            sha256 = hash_file(content) if isinstance(content, Path) else hashlib.sha256(content).hexdigest()
            return sha256 == self.sha256
        if isinstance(content, Path):
            if content.stat().st_size != self.size_bytes:
                return False
            content = content.read_bytes()  # small: a hub keeps large ones outside git
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
        return blob.hexdigest() == self.git_blob


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The files of one commit. `address` is pinned to it."""

    address: HubAddress
    files: Mapping[str, HubFile]


class Hub:
    """The hub at `endpoint`, by default the one that HF_ENDPOINT names, which gets this user's token unless
    `with_token` is False. `check` is called often during each call, also in other threads, and ends the call by
    raising. Raises Unavailable without the extra `hub`, and Usage for an invalid address. For any answer of a hub, the
    methods return a result or raise the errors that they name."""

    def __init__(
        self, endpoint: str | None = None, *, with_token: bool = True, check: Callable[[], None] = lambda: None
    ) -> None:
        self._api_class, own = _library()
        self.endpoint = own if endpoint is None else _address_of(endpoint)
        self._token = None if self.endpoint == own and with_token else False
        self._check = check

    def snapshot(self, address: HubAddress) -> Snapshot:
        """The commit that the address names now, and its files. Raises NotFound, NotAllowed, Unavailable."""
        with self._asked(address) as api:
            commit: object = api.model_info(address.repository, revision=address.revision).sha
        pinned = address.at(commit if isinstance(commit, str) else "")
        if not pinned.pinned:
            message = f"{self.endpoint} does not state the commit of {address}."
            raise Conflict("hub_conflict", message, subject=str(address), next_step="Name a commit of 40 digits.")
        with self._asked(pinned) as api:
            return Snapshot(pinned, _list(api, pinned))

    def download(self, snapshot: Snapshot, paths: Iterable[str], directory: Path) -> None:
        """Brings these files of the snapshot into the directory; resumes an earlier, interrupted call.

        Raises Invalid for a file whose content is not the one that the hub lists."""
        wanted = list(paths)
        self._download(snapshot, wanted, directory)
        for path in wanted:
            self._refuse_other_content(snapshot, directory / path, snapshot.files[path])

    def exclusive(self, directory: Path) -> AbstractContextManager[object]:
        """Keeps other processes from downloading into the same directory."""
        from huggingface_hub.utils import WeakFileLock

        directory.parent.mkdir(parents=True, exist_ok=True)
        return WeakFileLock(directory.with_name(f"{directory.name}.lock"))

    def cached(self, address: HubAddress) -> Path | None:
        """The snapshot of a pinned address in the hub's own cache, possibly incomplete; contacts no server."""
        from huggingface_hub.constants import HF_HUB_CACHE

        name = f"models--{address.repository.replace('/', '--')}"
        directory = Path(HF_HUB_CACHE).expanduser() / name / "snapshots" / str(address.revision)
        return directory if directory.is_dir() else None

    def bring_into_cache(self, snapshot: Snapshot, paths: Iterable[str]) -> Path:
        """Brings these files of the snapshot into the hub's own cache, and returns its directory there."""
        return self._download(snapshot, list(paths), None)

    def create(self, address: HubAddress, *, private: bool) -> None:
        """Makes the repository unless it exists. Raises NotAllowed if it is to be private and exists publicly."""
        with self._asked(address) as api:
            api.create_repo(address.repository, private=private or None, exist_ok=True)
            public = private and not api.model_info(address.repository, expand=["private"]).private
        if public:
            raise NotAllowed(
                "hub_public", f"{address} at {self.endpoint} exists already, and is public.", subject=str(address)
            )

    def tagged(self, address: HubAddress) -> Snapshot | None:
        """The commit that the tag of this name has, and its files; None without such a tag."""
        with self._asked(address) as api:
            tags = api.list_repo_refs(address.repository).tags
            commits = [tag.target_commit for tag in tags if tag.name == address.revision]
        return self.snapshot(address) if commits else None

    def write(
        self, address: HubAddress, files: Mapping[str, Content], removed: Sequence[str], message: tuple[str, str]
    ) -> str:
        """Commits the files to the main branch of the address's repository, and tags the commit with its revision.

        `message` has a title and a text. `removed` are deleted if they are there. Files that the branch already has are
        not sent again. Returns the commit. Raises Conflict if another client writes at the same time."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        title, text = message
        size_bytes = sum(file.stat().st_size if isinstance(file, Path) else len(file) for file in files.values())
        with self._asked(address, size_bytes) as api:
            head = api.model_info(address.repository).sha
            operations: list[Any] = [CommitOperationAdd(path, content) for path, content in files.items()]
            operations += [CommitOperationDelete(path) for path in removed]
            commit = api.create_commit(
                address.repository, operations, commit_message=title, commit_description=text, parent_commit=head
            ).oid
            api.create_tag(address.repository, tag=str(address.revision), revision=commit, tag_message=text or title)
        return commit

    def head(self, address: HubAddress) -> Mapping[str, HubFile]:
        """The files of the main branch; none in a repository without commits."""
        with self._asked(address) as api:
            if not api.model_info(address.repository).siblings:
                return {}
            return _list(api, HubAddress(address.repository))

    def _download(self, snapshot: Snapshot, paths: Sequence[str], directory: Path | None) -> Path:
        """Downloads into the directory, or into the cache. Raises Unavailable if some of the files are missing: the
        client returns such a snapshot, with a warning, if it cannot reach the server."""
        size_bytes = sum(snapshot.files[path].size_bytes for path in paths)
        with self._asked(snapshot.address, size_bytes) as api:
            directory = Path(
                api.snapshot_download(  # pyright: ignore[reportUnknownMemberType]
                    snapshot.address.repository,
                    revision=snapshot.address.revision,
                    allow_patterns=[escape(path) for path in paths],
                    local_dir=directory,
                )
            )
        if missing := [path for path in paths if not (directory / path).is_file()]:
            raise Unavailable(
                "hub_unavailable",
                f"{printed(missing[0])} of {snapshot.address} was not received from {self.endpoint}.",
                subject=printed(missing[0]),
            )
        return directory

    def _refuse_other_content(self, snapshot: Snapshot, path: Path, listed: HubFile) -> None:
        if listed.holds(path):
            return
        path.unlink()  # or the next download would treat it as complete
        raise Invalid(
            "digest_differs",
            f"{printed(listed.path)} of {snapshot.address} differs from the listing of {self.endpoint}.",
            subject=printed(listed.path),
            next_step="Try again. If it persists, do not use the repository.",
        )

    @contextmanager
    def _asked(self, address: HubAddress, files_bytes: int = 0) -> "Generator[HfApi]":
        """The client for one call about the address. Translates its errors."""
        what = str(address)
        with (
            translate_hub_errors(self.endpoint, what),
            limited(self.endpoint, what, files_bytes, self._check) as headers,
        ):
            yield self._api_class(endpoint=self.endpoint, token=self._token, library_name="adaptory", headers=headers)


def _list(api: "HfApi", address: HubAddress) -> dict[str, HubFile]:
    from huggingface_hub.hf_api import RepoFile

    entries = api.list_repo_tree(address.repository, recursive=True, revision=address.revision)
    files = [entry for entry in entries if isinstance(entry, RepoFile)]
    return {
        file.path: _listed(file.path, file.size, file.lfs.sha256 if file.lfs else None, file.blob_id) for file in files
    }


def _listed(path: object, size_bytes: object, sha256: object, git_blob: object) -> HubFile:
    """A file from a listing. Raises ValueError for an impossible one: the client does not validate what it receives."""
    if not isinstance(path, str):
        raise ValueError(f"it lists a file named {path!r:.200}")
    if not isinstance(size_bytes, int) or size_bytes < 0:
        raise ValueError(f"it lists {path!r:.200} with a size of {size_bytes!r:.40}")
    if not isinstance(git_blob, str) or not isinstance(sha256, str | None):
        raise ValueError(f"it lists {path!r:.200} with a digest that is not text")
    return HubFile(path, size_bytes, sha256, git_blob)


def _library() -> "tuple[type[HfApi], str]":
    """The client's class, and the address of its own hub."""
    try:
        from huggingface_hub import HfApi, constants
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "huggingface_hub":
            raise
        raise Unavailable(
            "extra_missing",
            "Access to a Hugging Face Hub needs its client, huggingface_hub, which is not installed.",
            subject="huggingface_hub",
            next_step="Install it: pip install 'adaptory[hub]'.",
        ) from error
    return HfApi, constants.ENDPOINT.rstrip("/")


def _address_of(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("https", "http") or not parts.hostname or parts.username or parts.query or parts.fragment:
        raise Usage(
            "bad_endpoint",
            f"{text[:200]!r} is not the address of a hub.",
            subject=text[:200],
            next_step="Write it as https://hub.example.org, without a name or a password.",
        )
    return text.rstrip("/")
