"""DIR of `adaptory mirror`: releases by commit and by version, the routes of channels, and the agent's state.

- `by-commit/COMMIT/`: a release's files. It appears complete and verified, and never changes.
- `by-version/acme/sql@1.2.0/`: the same files, as links, for servers that watch a directory. Only `adapter_config.json`
  is a copy, with the server's own base name, which vLLM's resolver compares with its `--model`.
- `signed.json`: the releases that the key of `--verify` was seen to have signed, for rounds without the registry.
- `routes.json`: the versions to which channels are routed, and the servers that have each version loaded.
- `state.json`: the last report, to read.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from tempfile import mkdtemp, mkstemp
from typing import Any, cast
from uuid import uuid4

from composer.errors import InvalidFile
from composer.formats.checkpoints.card import CARD_FILE, card_provenance
from composer.formats.checkpoints.hashing import hash_file
from composer.formats.sets.adapter_set import SET_FILE, AdapterSet, read_set
from composer.formats.sets.router import Router
from registry.agent.versions import ALL, ServedVersion, is_commit, member_version, parse_served
from registry.client.api import Api
from registry.client.cache import is_regular
from registry.client.pull import pull
from registry.errors import Conflict, Invalid, RegistryError, Unavailable
from registry.formats.manifest import ManifestFile, canonical_manifest, commit_id
from registry.formats.references import Digest, parse_reference
from registry.wire.search import AnyRelease

CONFIG = "adapter_config.json"
_SIGNED = "signed.json"
_MAX_CONFIG_BYTES = 1 << 20
_PART = ".part-"


@dataclass(frozen=True, slots=True)
class Signer:
    """The key that must have signed every release that is served. `verify` raises for a release with intact files that
    it has not signed."""

    fingerprint: str
    verify: Callable[[AnyRelease, Path], None]


@dataclass(frozen=True, slots=True)
class Routes:
    """`channels` has the weights of the versions that each channel is routed to, and `since` the time of its last
    change; `commits` the commit of every version that is named there; `servers` the addresses of the servers that have
    a version loaded and checked; `lora` has the scales that each request to an address must state, by id. `sets` has
    the members of each set by class, and `bases` the name of the base at an address that needs it. `phrases` has the
    phrases of versions by task."""

    channels: Mapping[str, Mapping[str, int]] = field(default_factory=dict[str, Mapping[str, int]])
    since: Mapping[str, str] = field(default_factory=dict[str, str])
    commits: Mapping[str, str] = field(default_factory=dict[str, str])
    servers: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    lora: Mapping[str, tuple[float, ...]] = field(default_factory=dict[str, tuple[float, ...]])
    sets: Mapping[str, Mapping[str, str]] = field(default_factory=dict[str, Mapping[str, str]])
    bases: Mapping[str, str] = field(default_factory=dict[str, str])
    phrases: Mapping[str, Mapping[str, str]] = field(default_factory=dict[str, Mapping[str, str]])

    def version(self, channel: str) -> ServedVersion | None:
        """The version that the channel serves: the first; a canary's candidate comes after it."""
        return next(iter(self.weights(channel)), None)

    def weights(self, channel: str) -> Mapping[ServedVersion, int]:
        return {self._served(name): weight for name, weight in self.channels.get(channel, {}).items()}

    def versions(self) -> frozenset[ServedVersion]:
        """The versions of all channels, and the members of those that are sets."""
        return frozenset(map(self._served, self.commits))

    def members(self, version: ServedVersion) -> Mapping[str, ServedVersion]:
        """The members of a set by class; empty for any other version."""
        return {part: self._served(name) for part, name in self.sets.get(version.name, {}).items()}

    def _served(self, name: str) -> ServedVersion:
        repository, _, version = name.partition("@")
        return ServedVersion(repository, version, self.commits[name])


_Stamps = frozenset[tuple[str, int, int, int]]
"""Path, inode, size and time of change of each file."""


class MirrorDirectory:
    """One agent's directory; `locked` keeps a second agent out."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self._by_commit, self._by_version = self.root / "by-commit", self.root / "by-version"
        self._intact, self._sets = dict[str, _Stamps](), dict[str, AdapterSet]()
        self._phrases = dict[str, Mapping[str, str]]()

    @contextmanager
    def locked(self) -> Generator[None]:
        """Makes the directory, and removes what a killed agent left unfinished. Raises Conflict while another
        agent uses it, Unavailable if it cannot be written."""
        with _writing(self.root):
            self._by_commit.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise Conflict("mirror_in_use", f"Another mirror uses {self.root}.", subject=str(self.root)) from None
        try:
            for left in self.root.glob(f"{_PART}*"):
                _delete(left)
            yield
        finally:
            os.close(handle)

    def path(self, commit: str) -> Path:
        return self._by_commit / commit

    def commit_of(self, path: str) -> str | None:
        """The commit of a path that a server has loaded; None for one outside this directory."""
        parent, _, name = path.rstrip("/").rpartition("/")  # a server may list a great many, and a Path is slow
        commit = None
        if parent == str(self._by_commit):
            commit = name
        elif parent.rpartition("/")[0] == str(self._by_version):
            commit = self._note_of(Path(path)).get("commit")
        return commit if isinstance(commit, str) and is_commit(commit) else None

    def fetch(self, api: Api, version: ServedVersion, signer: Signer | None) -> Path:
        """The release's directory, complete, verified, and signed by the signer if there is one. An existing one is
        verified once in each process, and again after a change of its files, without the registry, since its name is
        the hash of its files. Raises the registry's errors, Unavailable for a full disk, and what the signer raises."""
        target = self.path(version.commit)
        stamps = _stamps(target)
        intact = bool(stamps) and self._intact.get(version.commit) == stamps
        intact = intact or self._is_intact(target, version.commit)
        if intact:
            self._intact[version.commit] = stamps
        if signer is not None and self._signed(signer).get(version.name) != version.commit:
            release = _release(api, version)
            if intact:
                signer.verify(release, target)
            else:
                self._pull(api, version, release, partial(signer.verify, release))
            signed = {**self._signed(signer), version.name: version.commit}
            there = {name: commit for name, commit in signed.items() if self.path(commit).is_dir()}
            write_json(self.root / _SIGNED, {"key": signer.fingerprint, "releases": there})
        elif not intact:
            self._pull(api, version, _release(api, version), lambda _files: None)
        return target

    def _pull(self, api: Api, version: ServedVersion, release: AnyRelease, check: Callable[[Path], None]) -> None:
        target = self.path(version.commit)
        pull(api, release, target, lambda _count: None, None, check, replace=True)
        with _writing(target):
            _sync(self._by_commit)
        self._renew_version(version)
        self._intact[version.commit] = _stamps(target)

    def _signed(self, signer: Signer) -> Mapping[str, str]:
        """The commits of the versions that this key was seen to have signed; none for another key's file."""
        try:
            document = json.loads((self.root / _SIGNED).read_bytes())
            releases = {_version_name(name): _commit(commit) for name, commit in document["releases"].items()}
            return releases if document["key"] == signer.fingerprint else {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return {}

    def members(self, version: ServedVersion) -> Mapping[str, ServedVersion]:
        """The members of a set that was fetched, by class; empty for any other version. Raises Invalid for a damaged
        set."""
        if version.commit not in self._sets and not (self.path(version.commit) / SET_FILE).is_file():
            return {}
        return {name: member_version(member) for name, member in self._set(version.commit).members.items()}

    def phrases(self, commit: str) -> Mapping[str, str]:
        """The phrases by task that the card of a fetched release states."""
        card = self.path(commit) / CARD_FILE
        if commit not in self._phrases and card.is_file():
            self._phrases[commit] = card_provenance(card.read_bytes())[0].get("phrases", {})
        return self._phrases.get(commit, {})

    def router(self, commit: str) -> Router:
        """The router of a set that was fetched. Raises Invalid if it is missing or damaged."""
        return self._set(commit).routes

    def _set(self, commit: str) -> AdapterSet:
        """The set of a commit, which never changes: it is read once."""
        if commit not in self._sets:
            try:
                self._sets[commit] = read_set(self.path(commit) / SET_FILE)
            except InvalidFile as error:
                raise Invalid("bad_set", error.message, subject=commit, next_step=error.next_step) from error
        return self._sets[commit]

    def touch(self, commits: Iterable[str]) -> None:
        """Notes that these directories are needed now: their age counts from the last note."""
        for commit in commits:
            with _writing(self.path(commit)), suppress(FileNotFoundError):
                os.utime(self.path(commit))

    def make_version(self, version: ServedVersion, base_name: str | None) -> Path:
        """The directory of a version by name, made of links. With `base_name`, its configuration names that base."""
        target, note = self._by_version / version.name, {"commit": version.commit, "base_name": base_name}
        if self._note_of(target) == note:
            return target
        with _writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            part = Path(mkdtemp(dir=self.root, prefix=_PART))
            try:
                shutil.copytree(self.path(version.commit), part / "files", copy_function=os.link)
                _rename_base(part / "files" / CONFIG, base_name)
                self._note_path(target).parent.mkdir(parents=True, exist_ok=True)
                with suppress(FileNotFoundError):
                    target.rename(part / "replaced")
                (part / "files").rename(target)
                write_json(self._note_path(target), note)
            finally:
                shutil.rmtree(part, ignore_errors=True)
        return target

    def _renew_version(self, version: ServedVersion) -> None:
        """Makes the directory by name again if there is one: its links are to the files of before."""
        named = self._by_version / version.name
        if (note := self._note_of(named)).get("commit") == version.commit:
            with _writing(named):
                self._note_path(named).unlink()
            self.make_version(version, note.get("base_name"))

    def named_versions(self) -> Iterator[tuple[str, Path]]:
        """Yields the versions that have a directory by name."""
        for target in self._by_version.glob("*/*"):
            if target.is_dir() and parse_served(f"{target.parent.name}/{target.name}"):
                yield f"{target.parent.name}/{target.name}", target

    def notes(self) -> dict[str, Mapping[str, Any]]:
        """The commit and base name of every version that has a directory by name."""
        return {name: self._note_of(target) for name, target in self.named_versions()}

    def remove_version(self, name: str) -> None:
        with _writing(self._by_version / name):
            self._note_path(self._by_version / name).unlink(missing_ok=True)
        self._remove(self._by_version / name)

    def old(self, grace_s: float, now_s: float) -> Iterator[tuple[str, float]]:
        """Yields the commits whose directories have not been needed for `grace_s`, with the time of the last need."""
        for target in self._by_commit.glob("*"):
            with suppress(FileNotFoundError):
                last_s = target.stat().st_mtime
                if not target.name.startswith(".") and now_s - last_s >= grace_s:
                    yield target.name, last_s

    def remove(self, commit: str) -> None:
        self._intact.pop(commit, None)
        self._remove(self.path(commit))

    def remove_partial(self, needed: Container[str]) -> None:
        """Removes partial downloads, except those of the releases that are needed."""
        for left in self._by_commit.glob(".*.partial"):
            if left.name.split(".")[1] not in needed:
                self._remove(left)

    def routes(self) -> Routes:
        """The routes that were written last; none if they cannot be read."""
        return self.read_routes() or Routes()

    def read_routes(self) -> Routes | None:
        """The routes that were written last; None for a file that is missing, unreadable or damaged."""
        try:
            document = json.loads((self.root / "routes.json").read_bytes())
            commits = {_version_name(name): _commit(row["commit"]) for name, row in document["versions"].items()}
            channels = {
                channel: {name: int(weight) for name, weight in weights.items()}
                for channel, weights in document["channels"].items()
            }
            servers = {name: tuple(map(str, row["servers"])) for name, row in document["versions"].items()}
            lora = {url: tuple(map(float, scales)) for url, scales in document.get("lora", {}).items()}
            since = {channel: _moment(text) for channel, text in document["since"].items()}
            sets = {
                name: {part: str(member) for part, member in members.items()}
                for name, members in document.get("sets", {}).items()
            }
            bases = {url: str(name) for url, name in document.get("bases", {}).items()}
            phrases = {
                name: {task: str(phrase) for task, phrase in by_task.items()}
                for name, by_task in document.get("phrases", {}).items()
            }
        except (OSError, ValueError, OverflowError, KeyError, TypeError, AttributeError, RecursionError):
            return None
        known = all(commits.keys() >= weights.keys() for weights in channels.values())
        known = known and all(commits.keys() >= set(members.values()) for members in sets.values())
        weighed = all(min(weights.values()) >= 0 < sum(weights.values()) for weights in channels.values() if weights)
        return Routes(channels, since, commits, servers, lora, sets, bases, phrases) if known and weighed else None

    def reported_routes(self) -> Routes:
        """The routes that `state.json` says were in force, of each channel the version that it serves; none if it
        cannot be read. For an agent whose routes.json was lost."""
        channels, since, commits = dict[str, Mapping[str, int]](), dict[str, str](), dict[str, str]()
        try:
            for row in json.loads((self.root / "state.json").read_bytes())["channels"]:
                if row["version"] is None:
                    continue
                channel = str(row["channel"])
                name = _version_name(f"{channel.partition('@')[0]}@{row['version']}")
                channels[channel], since[channel] = {name: ALL}, _moment(row["since"])
                commits[name] = _commit(row["commit"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return Routes()
        return Routes(channels, since, commits)

    def write_routes(self, routes: Routes) -> None:
        versions = {
            name: {"commit": commit, "servers": list(routes.servers.get(name, ()))}
            for name, commit in sorted(routes.commits.items())
        }
        document = {"channels": routes.channels, "since": routes.since, "versions": versions, "lora": routes.lora}
        document |= {"sets": routes.sets, "bases": routes.bases, "phrases": routes.phrases}
        write_json(self.root / "routes.json", document)

    def write_state(self, state: Mapping[str, Any]) -> None:
        write_json(self.root / "state.json", state)

    def _remove(self, target: Path) -> None:
        """Removes a directory that no server has loaded, in one step for others."""
        trash = self.root / f"{_PART}{uuid4().hex}"
        with _writing(target), suppress(FileNotFoundError):
            target.rename(trash)  # which a full disk allows
            _delete(trash)

    def _note_path(self, target: Path) -> Path:
        return self._by_version / ".notes" / f"{target.relative_to(self._by_version)}.json"

    def _note_of(self, target: Path) -> Mapping[str, Any]:
        """The commit and base name of a version's directory; empty if it is not there, or not complete."""
        try:
            note: object = json.loads(self._note_path(target).read_bytes()) if target.is_dir() else None
        except (OSError, ValueError):
            return {}
        return cast(Mapping[str, Any], note) if isinstance(note, dict) else {}

    def _is_intact(self, directory: Path, commit: str) -> bool:
        """Whether the commit is that of the directory's files."""
        try:
            paths = [path for path in directory.rglob("*") if not path.is_dir()]
            if not paths or not all(map(is_regular, paths)):
                return False
            rows = [
                ManifestFile(path.relative_to(directory).as_posix(), path.stat().st_size, Digest(hash_file(path)))
                for path in paths
            ]
            return commit_id(canonical_manifest(rows)) == commit
        except (OSError, InvalidFile, RegistryError):
            return False


def _stamps(directory: Path) -> _Stamps:
    """A cheap stamp that changes when files are changed or replaced; empty for a directory that is not there."""
    with suppress(OSError):
        stats = [(str(path), path.lstat()) for path in directory.rglob("*") if not path.is_dir()]
        return frozenset((path, stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in stats)
    return frozenset()


def _release(api: Api, version: ServedVersion) -> AnyRelease:
    """Raises Invalid if the registry has another commit under this version."""
    release = api.resolve(parse_reference(version.reference)).release
    if release.commit != version.commit:
        raise Invalid(
            "other_release",
            f"The channel serves {version.reference} as {version.commit[:12]}, but that release is "
            f"{release.commit[:12]}.",
            subject=version.reference,
        )
    return release


def _version_name(name: str) -> str:
    """Raises ValueError for a name that is not of a version."""
    if parse_served(name) is None:
        raise ValueError(name)
    return name


def _commit(text: str) -> str:
    """Raises ValueError for anything but a commit."""
    if not is_commit(text):
        raise ValueError(text)
    return text


def _moment(text: str) -> str:
    """Raises ValueError for anything but a time with its zone."""
    if datetime.fromisoformat(text).tzinfo is None:
        raise ValueError(text)
    return text


def _delete(path: Path) -> None:
    """Removes a file, a link, or a directory with what is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _rename_base(config: Path, base_name: str | None) -> None:
    """Replaces the link to the configuration with a copy that names the base. The release's own file stays."""
    if base_name is None or not config.is_file() or config.stat().st_size > _MAX_CONFIG_BYTES:
        return
    document = json.loads(config.read_bytes())
    config.unlink()
    write_json(config, {**document, "base_model_name_or_path": base_name})


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Replaces the file in one step. Raises Unavailable if it cannot be written."""
    write_text(path, json.dumps(document, indent=1))


def write_text(path: Path, text: str) -> None:
    """Replaces the file in one step. Raises Unavailable if it cannot be written."""
    with _writing(path):
        handle, part = mkstemp(dir=path.parent, prefix=_PART)
        try:
            with os.fdopen(handle, "w") as file:
                file.write(text)
                file.flush()
                os.fsync(handle)
            Path(part).chmod(0o644)
            Path(part).replace(path)
        except BaseException:
            Path(part).unlink()
            raise
        _sync(path.parent)


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _writing(path: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise Unavailable(
            "disk_error",
            f"{path} cannot be written: {error.strerror}.",
            subject=str(path),
            next_step="Free some space, and check that the directory is writable; the mirror goes on by itself.",
        ) from error
