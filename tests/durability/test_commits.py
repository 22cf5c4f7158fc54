"""Commits during collections: files kept by a tag, the head of `main` or the retention are never lost."""

import base64
import json
import os
import random
import time
from collections.abc import Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from itertools import count
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import delete

from registry.database.tables import Upload
from registry.domain.access import namespaces
from registry.domain.access.audit import Act, Actor, EventQuery, list_oldest_first
from registry.domain.access.roles import EVERYWHERE, Role
from registry.domain.catalog import commits, releases
from registry.domain.channels import revisions, withdrawals
from registry.errors import Conflict, NotFound, RegistryError, Unavailable
from registry.formats.manifest import ManifestFile, parse_manifest
from registry.formats.references import Digest, RepositoryName, parse_version
from registry.transfer import commits as transfers
from registry.transfer import fsck, uploads
from registry.transfer.collect import Collected
from registry.transfer.collect import collect as collect_garbage
from registry.transfer.resources import Resources
from tests import services
from tests.durability.conftest import broken_promises, opened
from tests.durability.processes import NAME, Journal, collect_forever, kill, resources
from tests.durability.small import write_adapter
from tests.forked import start

DAY = timedelta(days=1)
NONE = timedelta(0)
KEPT_DAYS = 30
CONFIG = "adapter_config.json"
EXAMPLES, DAYS = count(1), [0.0]


@pytest.fixture
def held(environ: dict[str, str]) -> Generator[Resources]:
    opened_resources = opened(environ)
    yield opened_resources
    opened_resources.close()


def later(held: Resources, days: float) -> Resources:
    return replace(held, clock=lambda: datetime.now(UTC) + days * DAY)


def actor(held: Resources) -> Actor:
    return Actor("mia", held.clock(), {EVERYWHERE: Role.ADMIN.value})


def create(held: Resources, name: RepositoryName = NAME) -> None:
    with held.write() as session:
        commits.create_repository(session, actor(held), name)


def commit(held: Resources, files: Mapping[str, bytes], name: RepositoryName = NAME) -> str:
    """Adds files to `main`, as a client sends them."""
    lines = [{"key": "header", "value": {"summary": "A commit"}}]
    for path, content in files.items():
        value = {"content": base64.b64encode(content).decode(), "path": path, "encoding": "base64"}
        lines.append({"key": "file", "value": value})
    body = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    return transfers.receive(held, actor(held), name, [body])[0]


def tag(held: Resources, version: str, revision: str, name: RepositoryName = NAME) -> None:
    transfers.release(held, actor(held), name, revision, parse_version(version), "")


def adapter(seed: int) -> dict[str, bytes]:
    """The files of an adapter whose configuration names the base."""
    with TemporaryDirectory() as directory:
        written = write_adapter(Path(directory), seed)
        files = {path.name: path.read_bytes() for path in written.iterdir()}
    config = json.loads(files[CONFIG]) | {"base_model_name_or_path": "tiny"}
    return files | {CONFIG: json.dumps(config).encode()}


def is_complete(held: Resources, revision: str, name: RepositoryName = NAME) -> bool:
    """Whether the revision exists with all its bytes. Fails if it exists without them."""
    try:
        with held.snapshot() as session:
            located = revisions.locate(session, actor(held), str(name), revision)
    except NotFound:
        return False
    for file in parse_manifest(located.manifest):
        with held.store.open(file.sha256) as source:
            assert len(source.read()) == file.size_bytes, (revision, file.path)
    return True


def yanked(held: Resources, version: str, *, back: bool = False) -> None:
    with held.write() as session:
        release = releases.find(session, NAME, parse_version(version))
        (withdrawals.unyank if back else withdrawals.yank)(session, actor(held), release, "leaks a name")


def main_of(held: Resources, who: Actor | None = None, revision: str = "main") -> str | None:
    """The commit of `main`; None if it is not there for this actor."""
    with held.snapshot() as session:
        try:
            return revisions.locate(session, who or actor(held), str(NAME), revision).commit
        except NotFound as error:
            if error.code != "revision_unknown":
                raise
            return None


def test_main_is_the_last_commit_that_was_not_released_and_yanked(held: Resources) -> None:
    create(held)
    first, second = commit(held, adapter(1)), commit(held, adapter(2))
    tag(held, "1.0.0", second)
    yanked(held, "1.0.0")
    assert main_of(held) == first
    assert collect_garbage(later(held, KEPT_DAYS + 1), grace=DAY).commits == 0, "the head of main is kept"
    assert commit(held, adapter(2)) == second
    assert main_of(held) == first, "the same files are yanked as they were"
    third = commit(held, {"notes.txt": b"more"})
    assert main_of(held) == third
    tag(held, "1.1.0", "main")
    yanked(held, "1.1.0")
    assert main_of(held) == first
    yanked(held, "1.1.0", back=True)
    assert main_of(held) == third


def test_where_main_serves_releases_commits_are_drafts_of_publishers(held: Resources) -> None:
    create(held)
    first = commit(held, adapter(1))
    with held.write() as session:
        namespaces.change(session, actor(held), NAME.namespace, namespaces.NamespaceChange(main="release"))
    reader = Actor("rita", held.clock(), {NAME.namespace: Role.READER.value})
    robot = Actor("robot", held.clock(), {str(NAME): Role.PUBLISHER.value})
    seen = {
        revision: [main_of(held, who, revision) for who in (reader, robot)]
        for revision in ("main", "next", first, first[:9])
    }
    assert seen == {"main": [None, None], "next": [None, first], first: [None, first], first[:9]: [None, first]}
    tag(held, "1.0.0", "main")
    second = commit(held, {"notes.txt": b"more"})
    assert [main_of(held, reader), main_of(held, robot, "next"), main_of(held, reader, second)] == [first, second, None]
    with held.snapshot() as session:
        shown = [revisions.list_refs(session, who, str(NAME)) for who in (reader, robot)]
        assert [(row.main, row.drafts) for row in shown] == [(first, None), (first, second)]
        assert [row.commit for row in commits.list_history(session, NAME, first, drafts=False)] == [first]
    tag(held, "1.1.0", "main")
    assert main_of(held, reader) == second
    yanked(held, "1.1.0")
    assert main_of(held, reader) == first
    with held.write() as session:
        namespaces.change(session, actor(held), NAME.namespace, namespaces.NamespaceChange(main="commit"))
    third = commit(held, {"notes.txt": b"unreleased"})
    assert [main_of(held, reader), main_of(held, reader, "next")] == [third, None]


def test_who_knows_the_digest_of_a_draft_reads_it_only_as_a_publisher(held: Resources) -> None:
    create(held)
    first = commit(held, adapter(1))
    with held.write() as session:
        namespaces.change(session, actor(held), NAME.namespace, namespaces.NamespaceChange(main="release"))
    tag(held, "1.0.0", "main")
    second = commit(held, {"notes.txt": b"more"})
    reader = Actor("rita", held.clock(), {NAME.namespace: Role.READER.value})
    with held.snapshot() as session:
        released, drafts = (
            {file.sha256 for file in parse_manifest(revisions.locate(session, actor(held), str(NAME), commit).manifest)}
            for commit in (first, second)
        )
    for sha256 in drafts:
        assert uploads.readable(held, actor(held), sha256)
        if sha256 in released:
            assert uploads.readable(held, reader, sha256)
        else:
            with pytest.raises(NotFound):
                uploads.readable(held, reader, sha256)
    assert len(drafts - released) == 1


def test_a_commit_goes_when_its_retention_ends_unless_a_tag_or_main_names_it(held: Resources) -> None:
    create(held)
    tagged, passed = commit(held, adapter(1)), commit(held, {"notes.txt": b"only here"})
    head = commit(held, {"notes.txt": b"the last one"})
    tag(held, "1.0.0", tagged)
    assert collect_garbage(later(held, KEPT_DAYS - 1), grace=DAY) == Collected()
    assert is_complete(held, passed)
    planned = collect_garbage(later(held, KEPT_DAYS + 1), grace=DAY, dry_run=True)
    removed = collect_garbage(later(held, KEPT_DAYS + 1), grace=DAY)
    assert (removed.commits, removed.blobs, removed.size_bytes) == (1, 1, len(b"only here"))
    assert (planned.commits, planned.blobs, planned.size_bytes) == (1, 1, len(b"only here"))
    assert [is_complete(held, revision) for revision in (tagged, passed, head, "main", "1.0.0")] == [
        True,
        False,
        True,
        True,
        True,
    ]
    assert collect_garbage(later(held, 3650), grace=NONE).commits == 0, "the head and what is tagged never go"
    with held.read() as session:
        (event,) = list_oldest_first(session, EventQuery(namespace="acme", act=Act.REPOSITORY_FORGET))
    assert (event.subject, event.before) == (str(NAME), {"commit": passed})
    assert commit(held, {"notes.txt": b"only here"}) == passed, "and it can come again"
    assert fsck.check(held, read_bytes=True) == []


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("commit"), st.integers(0, 2)),
        st.tuples(st.just("tag"), st.integers(0, 5)),
        st.tuples(st.just("wait"), st.integers(1, 40)),
        st.tuples(st.just("gc"), st.just(0)),
    ),
    min_size=3,
    max_size=12,
)


@dataclass
class History:
    """The expected state of a registry: the commits with their days, and the tagged ones."""

    commits: list[tuple[str, float]] = field(default_factory=list[tuple[str, float]])
    tags: dict[str, str] = field(default_factory=dict[str, str])
    gone: set[str] = field(default_factory=set[str])

    def collect(self, day: float) -> None:
        followers = [*(made_on for _, made_on in self.commits[1:]), day]  # the head is followed by nothing yet
        kept = {made for (made, _), end in zip(self.commits, followers, strict=False) if end > day - KEPT_DAYS}
        self.gone |= {made for made, _ in self.commits} - kept - set(self.tags.values())
        self.commits = [commit for commit in self.commits if commit[0] not in self.gone]


@pytest.mark.long
@pytest.mark.parametrize("pairing", services.PAIRINGS[:1], indirect=True)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_what_a_model_of_the_retention_keeps_is_there_and_nothing_else(
    held: Resources, steps: list[tuple[str, int]]
) -> None:
    """The days go on from one example to the next, each in a repository with contents of its own."""
    example, day = next(EXAMPLES), DAYS[-1]
    name, history = RepositoryName("acme", f"r{example}"), History()
    create(later(held, day), name)
    for act, number in steps:
        now = later(held, day)
        if act == "wait":
            day += number
        elif act == "gc":
            collect_garbage(now, grace=DAY)
            history.collect(day)
        elif act == "commit":
            made = commit(now, adapter(example * 3 + number), name)
            if not history.commits or history.commits[-1][0] != made:
                history.commits.append((made, day))
                history.gone.discard(made)
        elif history.commits or history.gone:
            known = sorted(history.gone) + [made for made, _ in history.commits]
            chosen, version = known[number % len(known)], f"{len(history.tags) + 1}.0.0"
            if chosen in history.gone:
                with pytest.raises(NotFound):
                    tag(now, version, chosen, name)
            else:
                tag(now, version, chosen, name)
                history.tags[version] = chosen
    DAYS.append(day)
    for made, _ in history.commits:
        assert is_complete(held, made, name)
    assert all(is_complete(held, version, name) for version in history.tags)
    assert not any(is_complete(held, made, name) for made in history.gone)
    assert [finding for finding in fsck.check(held, read_bytes=True) if finding.severity == "error"] == []


@pytest.mark.long
def test_a_tag_beside_a_collection_makes_a_complete_release_or_none(held: Resources, tmp_path: Path) -> None:
    """Every commit is forgotten as soon as the next one exists."""
    create(held)
    collector = replace(held, settings=held.settings.model_copy(update={"commit_retention_days": 0}))
    # For this registry uploads have expired, so that bytes are kept only if they are named, but not the files of a tag
    # in progress.
    collector = replace(later(collector, 2), work_directory=tmp_path)
    released = dict[str, str]()
    for number in range(1, 9):
        earlier, _ = commit(held, adapter(number)), commit(held, {"notes.txt": str(number).encode()})
        with ThreadPoolExecutor(2) as pool:
            collected = pool.submit(collect_garbage, collector, grace=NONE)
            tagged = pool.submit(tag, held, f"{number}.0.0", earlier)
            collected.result()
            if (error := tagged.exception()) is None:
                released[f"{number}.0.0"] = earlier
            else:
                assert isinstance(error, RegistryError), error
                assert error.code in ("revision_unknown", "blob_missing", "blob_leaving", "blob_unknown"), error
        assert is_complete(held, "main")
    assert all(is_complete(held, version) for version in released)
    assert [finding for finding in fsck.check(held, read_bytes=True) if finding.severity == "error"] == []


@pytest.mark.long
def test_a_tag_of_a_commit_that_is_being_forgotten_leaves_main_where_it_is(
    held: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A collection forgets the commit while it is tagged."""
    create(held)
    first = commit(held, adapter(1))
    head = commit(held, adapter(2) | {"notes.txt": b"2"})
    keep = uploads.keep

    def keep_and_forget(*arguments: Any) -> Any:
        with held.write() as session:
            assert commits.forget(session, actor(held), held.clock() + DAY, 10) == 1
        return keep(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(uploads, "keep", keep_and_forget)
        tag(held, "1.0.0", first)
    with held.snapshot() as session:
        assert [revisions.locate(session, actor(held), str(NAME), name).commit for name in ("1.0.0", "main")] == [
            first,
            head,
        ]


def commit_and_tag(journal_path: str, seed: int) -> None:
    """Commits and tags the commits, until it is killed."""
    held, journal, chance = resources(), Journal(Path(journal_path)), random.Random(seed)
    while True:
        number = 1 + max((line["number"] for line in journal.read()), default=0)
        journal.note("begin", {"number": number})
        try:
            made = commit(held, adapter(number))
            journal.note("made", {"number": number, "commit": made})
            if chance.random() < 0.5:
                commit(held, {"notes.txt": str(number).encode()})
            tag(held, f"{number}.0.0", made)
            journal.note("done", {"number": number, "commit": made})
        except (Unavailable, Conflict, NotFound) as error:
            journal.note("refused", {"number": number, "code": error.code})


def _wait_for_more(journal: Journal, before: int, deadline: float) -> None:
    while len(journal.done) <= before and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.long
@pytest.mark.parametrize("kills", [2, 40])
def test_no_kill_of_a_committer_or_of_a_collector_loses_a_tag(
    environ: dict[str, str], tmp_path: Path, kills: int
) -> None:
    seed = int(os.environ.get("ADAPTORY_TEST_SEED", random.SystemRandom().randrange(10**6)))
    chance = random.Random(seed)
    environ |= {"ADAPTORY_COMMIT_RETENTION_DAYS": "0", "ADAPTORY_UPLOAD_EXPIRES_S": "2"}
    journal = Journal(tmp_path / "journal")
    held = opened(environ)
    create(held)

    def begin(role: str) -> BaseProcess:
        if role == "collector":
            return start(collect_forever, environ)
        return start(commit_and_tag, environ, str(journal.path), chance.randrange(10**6))

    alive = {role: begin(role) for role in ("committer", "collector")}
    _wait_for_more(journal, 0, time.monotonic() + 60)
    deadline = time.monotonic() + 20
    for _ in range(kills):
        _wait_for_more(journal, len(journal.done), deadline)
        time.sleep(chance.uniform(0, 0.2))
        victim = chance.choice(list(alive))
        kill(alive[victim])
        alive[victim] = begin(victim)
    for process in alive.values():
        kill(process)
    done = {line["number"]: line["commit"] for line in journal.done}
    assert done, (seed, journal.read()[-5:])
    with held.snapshot() as session:
        for number, made in done.items():
            assert revisions.locate(session, actor(held), str(NAME), f"{number}.0.0").commit == made, seed
    assert all(is_complete(held, f"{number}.0.0") for number in done), seed
    assert is_complete(held, "main"), seed
    held.close()
    assert broken_promises(environ, read_bytes=True) == [], seed


@pytest.mark.on("PostgreSQL")
def test_an_expired_upload_that_a_collection_removes_meanwhile_is_announced_anew(held: Resources) -> None:
    file, tomorrow = ManifestFile("a.bin", 3, Digest("1" * 64)), later(held, 2)
    uploads.announce(held, actor(held), NAME.namespace, [file])
    with ThreadPoolExecutor(1) as pool:
        with held.write() as session:
            session.execute(delete(Upload))
            announced = pool.submit(uploads.announce, tomorrow, actor(tomorrow), NAME.namespace, [file])
            time.sleep(0.5)  # it has read the rows, or waits for its turn
        ((row, _),) = announced.result().values()
    with held.database.read() as session:
        assert session.get(Upload, row.id) is not None
