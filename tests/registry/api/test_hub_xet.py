"""The upload endpoint for clients with `hf_xet`, byte by byte: requests that no real client sends are refused."""

import hashlib
import random
import sys
import tracemalloc
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx2
import pytest
from sqlalchemy import func, select

from registry.database.tables import Blob, BlobHolder, XetUpload, XetXorb
from registry.domain.access.audit import Actor
from registry.errors import Unauthenticated
from registry.formats.references import parse_repository
from registry.formats.xet import MAX_CHUNK_BYTES, MAX_CHUNKS
from registry.transfer import xet
from registry.transfer.collect import collect
from tests import services
from tests.access.house import PRIVATE, House, entered, new_house
from tests.registry.api.test_hub_commits import commit, lfs, read
from tests.xet_wire import GROUPED, LZ4, PLAIN, Segment, chunk, header, name_of, shard

CHUNK = 64 << 10


@pytest.fixture(scope="module", params=services.PAIRINGS)
def house(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Generator[House]:
    house = new_house(request.param, tmp_path_factory.mktemp("house"))
    yield house
    house.close()


@dataclass(frozen=True)
class Push:
    """A client's push with one token."""

    house: House
    token: str
    path: str

    def post(self, path: str, content: bytes | Iterator[bytes]) -> httpx2.Response:
        headers = {"Authorization": f"Bearer {self.token}"}
        return self.house.ask("nobody", "POST", f"{self.path}/{path}", content=content, headers=headers)

    def xorb(self, *chunks: bytes) -> httpx2.Response:
        content = b"".join(chunks)
        return self.post(f"v1/xorbs/default/{name_of(content)}", content)


def begin(house: House, caller: str = "publisher", repository: str = "acme/sql") -> Push:
    answer = house.ask(caller, "GET", f"/api/models/{repository}/xet-write-token/main").raise_for_status().json()
    left_s = answer["exp"] - datetime.now(UTC).timestamp()
    assert 0 < left_s <= xet.PERMIT_S
    return Push(house, answer["accessToken"], answer["casUrl"].removeprefix("http://registry"))


def pieces(seed: object, count: int, size: int = CHUNK) -> list[bytes]:
    """Chunks that compress: half of each is random."""
    chance = random.Random(str(seed))
    return [chance.randbytes(size // 2) + bytes(size - size // 2) for _ in range(count)]


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def is_held(house: House, content: bytes) -> bool:
    with house.resources.read() as session:
        return session.get(BlobHolder, (sha256(content), "acme")) is not None


@pytest.fixture
def named(house: House, request: pytest.FixtureRequest) -> str:
    """An empty repository of the test's own."""
    name = f"x{sha256(request.node.nodeid.encode())[:10]}"
    house.ask("publisher", "POST", "/api/repos/create", json={"name": name, "organization": "acme"}).raise_for_status()
    return f"acme/{name}"


@pytest.mark.parametrize("stated", [True, False])
@pytest.mark.parametrize("shards", ["v1/shards", "shards"])
def test_files_are_put_together_of_chunks_and_committed(house: House, named: str, stated: bool, shards: str) -> None:
    chunks = [*pieces(f"{named} {stated}", 5), b"the end"]
    schemes = (PLAIN, LZ4, GROUPED, LZ4, GROUPED, GROUPED)
    xorb = b"".join(chunk(plain, scheme) for plain, scheme in zip(chunks, schemes, strict=True)) + b"XETBLOB and more"
    push = begin(house, repository=named)
    assert push.xorb(xorb).json() == {"was_inserted": True}
    assert push.xorb(xorb).json() == {"was_inserted": False}
    name, content = name_of(xorb), b"".join(chunks)
    turned = chunks[4] + b"".join(chunks[1:4]) + chunks[4]
    segments = [Segment(name, 0, 6, len(content))]
    others = [Segment(name, *span, CHUNK * (span[1] - span[0])) for span in ((4, 5), (1, 4), (4, 5))]
    document = shard(
        (segments, sha256(content) if stated else None), (others, sha256(turned) if stated else None), checks=stated
    )
    for _ in range(2):  # the answer may be lost
        assert push.post(shards, document).json() == {"result": 1}
    commit(house, named, lfs("whole.dat", content), lfs("turned.dat", turned)).raise_for_status()
    assert (read(house, named, "whole.dat"), read(house, named, "turned.dat")) == (content, turned)


def test_servers_beside_each_other_take_parts_of_one_push(house: House, named: str, tmp_path: Path) -> None:
    """Nothing of a push is on a server's own disk, except during a request."""
    other = entered(house, {**house.environ})
    try:
        first, second = (chunk(plain) for plain in pieces(named, 2))
        push = begin(house, repository=named)
        beside = replace(push, house=other)
        push.xorb(first).raise_for_status()
        beside.xorb(second).raise_for_status()
        content = b"".join(pieces(named, 2))
        segments = [Segment(name_of(xorb), 0, 1, CHUNK) for xorb in (first, second)]
        beside.post("v1/shards", shard((segments, sha256(content)))).raise_for_status()
        commit(house, named, lfs("w.dat", content)).raise_for_status()
        assert read(house, named, "w.dat") == content
    finally:
        other.close()


@pytest.mark.on("PostgreSQL")
def test_only_publishers_begin_a_push_and_are_refused_in_words(house: House) -> None:
    address = "/api/models/acme/sql/xet-write-token/main"
    refused = house.ask("reader", "GET", address)
    assert (refused.status_code, "the role publisher" in refused.headers["X-Error-Message"]) == (403, True)
    planned = house.ask("reader", "POST", "/api/models/acme/sql/preupload/main", json={"files": []})
    assert (planned.status_code, "the role publisher" in planned.headers["X-Error-Message"]) == (403, True)
    assert house.ask("publisher", "GET", address.replace("main", "prod")).status_code == 400


def test_a_token_is_for_the_pushes_of_its_user_and_repository_alone(house: House, named: str) -> None:
    push, content = begin(house, repository=named), chunk(b"x")
    again = begin(house, repository=named)
    assert again.path != push.path
    assert replace(push, token=again.token).xorb(content).status_code == 200, "the client stays at its first address"
    for other in (
        replace(push, token=begin(house, "releaser", named).token),
        replace(push, token=begin(house).token),
        replace(push, token=push.token[:-1] + ("0" if push.token[-1] != "0" else "1")),
        replace(push, token=house.secrets["publisher"]),
        replace(push, token=""),
        replace(push, path="/xet/" + "0" * 32),
        replace(push, path="/xet/x"),
    ):
        answer = other.xorb(content)
        assert (answer.status_code, answer.json()["code"]) == (401, "upload_token_invalid")


@pytest.mark.on("PostgreSQL")
def test_a_token_ends_after_an_hour_and_a_push_after_a_day(house: House, named: str) -> None:
    push = begin(house, repository=named)
    upload = push.path.removeprefix("/xet/")

    def at(later: timedelta, token: str) -> None:
        xet.authenticate(replace(house.resources, clock=lambda: datetime.now(UTC) + later), upload, token)

    at(timedelta(minutes=59), push.token)
    with pytest.raises(Unauthenticated, match="token"):
        at(timedelta(minutes=61), push.token)
    with house.resources.write() as session:
        row = session.get(XetUpload, upload)
        assert row is not None
        row.expires_at -= timedelta(days=1)
    with pytest.raises(Unauthenticated, match="address"):
        at(timedelta(0), begin(house, repository=named).token)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it has no chunk"),
        (b"XETBLOB", "it has no chunk"),
        (chunk(b"x" * 100)[:-1], "ends within a chunk"),
        (chunk(b"x" * 100) + b"\0\0", "ends within a chunk"),
        (header(4, 3, 4) + b"abcd", "unknown compression 3"),
        (header(4, PLAIN, 0) + b"abcd", "with 0 plain ones"),
        (header(0, LZ4, 4), "a chunk of 0 bytes"),
        (header(4, PLAIN, 5) + b"abcd", "has two lengths"),
        (header(4, LZ4, MAX_CHUNK_BYTES + 1) + b"abcd", "the limit is"),
        (chunk(b"x", PLAIN) * (MAX_CHUNKS + 1), "more than 8,192 chunks"),
    ],
)
def test_a_xorb_that_cannot_be_is_refused(house: House, content: bytes, words: str) -> None:
    push = begin(house)
    answer = push.xorb(content)
    assert (answer.status_code, answer.json()["code"]) == (422, "bad_xorb")
    assert words in answer.json()["detail"], answer.text
    assert push.post("v1/xorbs/default/nothing", chunk(b"x")).status_code == 422


def test_a_xorb_is_cut_off_at_its_limit(house: House) -> None:
    def endless() -> Iterator[bytes]:
        piece = chunk(bytes(MAX_CHUNK_BYTES), PLAIN)
        for _ in range(320):
            yield piece

    answer = begin(house).post(f"v1/xorbs/default/{name_of(b'')}", endless())
    assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")


BOMB = chunk(bytes(900_000), claimed=1000)


@pytest.mark.on("PostgreSQL")
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (BOMB, "does not have the 1,000 plain bytes"),
        (chunk(b"x" * 10, claimed=1000), "does not have the 1,000 plain bytes"),
        (header(9, LZ4, 1000) + b"not a LZ4", "not an LZ4 frame"),
        (header(len(BOMB), LZ4, 1000) + BOMB, "not an LZ4 frame"),
    ],
)
def test_a_chunk_never_becomes_more_than_its_header_says(house: House, content: bytes, words: str) -> None:
    push = begin(house)
    push.xorb(content).raise_for_status()
    answer = push.post("v1/shards", shard(([Segment(name_of(content), 0, 1, 1000)], None)))
    assert (answer.status_code, words in answer.json()["detail"]) == (422, True), answer.text


REPEATED = chunk(b"r" * CHUNK)
SMALL = chunk(b"s", PLAIN) * 100
Shards = Callable[[str, str], bytes]


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda _, __: b"", "does not begin like a shard"),
        (lambda _, __: b"HFRepoMetaData".ljust(32, b"\0") + b"\3" + bytes(15), "version is 3, not 2"),
        (lambda one, _: shard(([Segment(one, 0, 1, CHUNK)], None))[:-60], "ends too early"),
        (lambda one, _: shard(([Segment(one, 0, 2, CHUNK)], None)), "has 1 chunks, not 2"),
        (lambda one, _: shard(([Segment(one, 0, 1, CHUNK + 1)], None)), "65,536 bytes, not 65,537"),
        (lambda one, _: shard(([Segment(one, 1, 1, CHUNK)], None)), "a segment is empty"),
        (lambda one, _: shard(([Segment(one, 1, 0, CHUNK)], None)), "a segment is empty"),
        (lambda one, _: shard(([Segment(one, 0, 1, 0)], None)), "a segment is empty"),
        (lambda _, __: shard(([Segment("ab" * 32, 0, 1, CHUNK)], None)), "was not sent"),
        (lambda _, two: shard(([Segment(two, 0, 100, 100)], None)), "has 100 chunks"),
        (lambda one, _: shard(([Segment(one, 0, 1, CHUNK)], "0" * 64)), "do not make the file"),
    ],
)
def test_a_shard_that_does_not_agree_is_refused_and_nothing_is_made(house: House, made: Shards, words: str) -> None:
    push = begin(house)
    push.xorb(REPEATED).raise_for_status()
    push.xorb(SMALL).raise_for_status()
    answer = push.post("v1/shards", made(name_of(REPEATED), name_of(SMALL)))
    assert (answer.status_code, words in answer.json()["detail"]) == (422, True), answer.text
    assert not is_held(house, b"r" * CHUNK)
    assert not list(house.resources.work_directory.glob("upload-*"))


def test_what_others_have_sent_is_of_no_use(house: House) -> None:
    begin(house).xorb(REPEATED).raise_for_status()
    answer = begin(house).post("v1/shards", shard(([Segment(name_of(REPEATED), 0, 1, CHUNK)], None)))
    assert "was not sent" in answer.json()["detail"]


def test_a_small_upload_does_not_become_a_huge_file(house: House) -> None:
    """Repeated chunks are valid: a file of zeros is sent that way. The size of the assembled file is still limited."""
    limited = entered(house, house.environ, max_file_bytes=4 * CHUNK)
    try:
        push = replace(begin(house), house=limited)
        push.xorb(REPEATED).raise_for_status()
        one = Segment(name_of(REPEATED), 0, 1, CHUNK)
        answer = push.post("v1/shards", shard(([one] * 5, None)))
        assert (answer.status_code, answer.json()["code"]) == (413, "file_too_large")
        fitting = shard(*[([one] * count, None) for count in (4, 3, 4, 4)])
        push.post("v1/shards", fitting).raise_for_status()
        answer = push.post("v1/shards", shard(([one] * 2, None)))
        assert (answer.status_code, answer.json()["code"]) == (413, "push_too_large")
        assert is_held(house, b"r" * CHUNK * 4)
        assert not is_held(house, b"r" * CHUNK * 2)
        for number in range(14):  # the first xorb counts with its unpacked size
            push.xorb(chunk(random.Random(number).randbytes(CHUNK), PLAIN)).raise_for_status()
        answer = push.xorb(chunk(random.Random(15).randbytes(CHUNK), PLAIN))
        assert (answer.status_code, answer.json()["code"]) == (413, "push_too_large")
    finally:
        limited.close()


def test_a_file_too_large_is_refused_before_anything_is_sent(house: House, named: str) -> None:
    size = house.resources.settings.max_file_bytes + 1
    body = {"files": [{"path": "w.dat", "size": size}]}
    answer = house.ask("publisher", "POST", f"/api/models/{named}/preupload/main", json=body)
    assert (answer.status_code, "ADAPTORY_MAX_FILE_BYTES" in answer.headers["X-Error-Message"]) == (413, True)


def test_no_file_is_in_the_memory_of_the_server(house: House, named: str) -> None:
    size, plain = 48 << 20, [random.Random(named).randbytes(CHUNK)]
    chunks = plain * (size // CHUNK)
    xorb = b"".join(chunk(content, GROUPED) for content in chunks[:512])
    permit = xet.begin(house.resources, _publisher(), parse_repository(named))
    push = xet.authenticate(house.resources, permit.upload_id, permit.token)
    segments = [Segment(name_of(xorb), 0, 256, 256 * CHUNK)] * 3
    document = shard((segments, sha256(b"".join(chunks))))
    tracemalloc.start()
    try:
        xet.receive_xorb(house.resources, push, name_of(xorb), _cut(xorb))
        xet.receive_shard(house.resources, push, _cut(document))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert is_held(house, b"".join(chunks))
    assert peak < 12 << 20, f"{peak:,} bytes"


def _publisher() -> Actor:
    return Actor("publisher", datetime.now(UTC), {"acme": "publisher"})


def _cut(content: bytes) -> Iterator[bytes]:
    return (content[start : start + CHUNK] for start in range(0, len(content), CHUNK))


def test_what_is_not_committed_is_collected_with_all_that_came_for_it(house: House, named: str) -> None:
    used, unused = (pieces(f"{named} {which}", 3) for which in ("used", "unused"))
    push, xorbs = begin(house, repository=named), list[str]()
    for chunks in (used, unused):
        xorb = b"".join(chunk(content) for content in chunks)
        xorbs.append(name_of(xorb))
        push.xorb(xorb).raise_for_status()
        segment = Segment(name_of(xorb), 0, 3, 3 * CHUNK)
        push.post("v1/shards", shard(([segment], sha256(b"".join(chunks))))).raise_for_status()
    commit(house, named, lfs("w.dat", b"".join(used))).raise_for_status()
    collect(house.resources, grace=timedelta(0))
    assert is_held(house, b"".join(unused)), "a commit may still name it"
    later = replace(house.resources, clock=lambda: datetime.now(UTC) + timedelta(days=1, minutes=1))
    collect(later, grace=timedelta(0))
    assert read(house, named, "w.dat") == b"".join(used)
    with house.resources.read() as session:
        counts = [session.scalar(select(func.count()).select_from(table)) for table in (XetUpload, XetXorb)]
        left = set(session.scalars(select(Blob.sha256))) & {*xorbs, sha256(b"".join(used)), sha256(b"".join(unused))}
    assert counts == [0, 0]
    assert left == {sha256(b"".join(used))}


def test_a_server_without_lz4_says_so(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lz4", None)
    answer = house.ask("publisher", "GET", "/api/models/acme/sql/xet-write-token/main")
    assert (answer.status_code, answer.json()["code"]) == (503, "extra_missing")
    assert "HF_HUB_DISABLE_XET=1" in answer.headers["X-Error-Message"]
    body = {"files": [{"path": "w.dat", "size": 5 << 20}]}
    planned = house.ask("publisher", "POST", "/api/models/acme/sql/preupload/main", json=body)
    assert "HF_HUB_DISABLE_XET=1" in planned.headers["X-HF-Warning"], "a client with hf_xet shows no other refusal"


@pytest.mark.parametrize("ending", ["token", "role"])
def test_after_a_revocation_a_push_stores_nothing_more(house: House, named: str, ending: str) -> None:
    made = house.ask("operator", "POST", "/v1/tokens", json={"user": "publisher"}).json()
    house.secrets["leaving"] = made["token"]
    push, others = begin(house, "leaving", named), begin(house, "publisher", named)
    content = [b"".join(map(chunk, pieces(f"{named}{number}", 1))) for number in range(3)]
    assert push.xorb(content[0]).status_code == 200
    members = f"/v1/namespaces/{PRIVATE}/members"

    def end() -> None:
        if ending == "token":
            assert house.ask("operator", "DELETE", f"/v1/tokens/{made['id']}").status_code == 200
        else:
            house.ask("operator", "PUT", members, json={"user": "publisher", "role": "reader"}).raise_for_status()

    def slow() -> Iterator[bytes]:
        yield content[1][:100]
        end()
        yield content[1][100:]

    try:
        assert push.post(f"v1/xorbs/default/{name_of(content[1])}", slow()).status_code == 401, "it ended meanwhile"
        refused = push.xorb(content[2])
        assert (refused.status_code, refused.json()["code"]) == (401, "upload_token_invalid")
        assert push.post("v1/shards", shard(([Segment(name_of(content[0]), 0, 1, CHUNK)], None))).status_code == 401
        assert others.xorb(content[2]).status_code == (200 if ending == "token" else 401)
    finally:
        house.ask("operator", "PUT", members, json={"user": "publisher", "role": "publisher"}).raise_for_status()
    assert not is_held(house, content[1])


@pytest.mark.on("PostgreSQL")
def test_what_is_sent_counts_at_once_as_what_it_unpacks_to(house: House, named: str) -> None:
    usage, quota = f"/v1/namespaces/{PRIVATE}/usage", f"/v1/namespaces/{PRIVATE}/quota"
    before = house.ask("publisher", "GET", usage).json()["size_bytes"]
    push, zeros = begin(house, repository=named), bytes(MAX_CHUNK_BYTES)
    xorb = chunk(zeros) * 8
    assert len(xorb) < MAX_CHUNK_BYTES // 4
    assert push.xorb(xorb).status_code == 200
    assert house.ask("publisher", "GET", usage).json()["size_bytes"] >= before + 8 * len(zeros)
    limit = {"max_bytes": before + 10 * len(zeros), "max_releases": None}
    house.ask("operator", "PUT", quota, json=limit).raise_for_status()
    try:
        refused = push.xorb(chunk(zeros) * 4)
        assert (refused.status_code, refused.json()["code"]) == (422, "quota_exceeded")
        file = shard(([Segment(name_of(xorb), 0, 8, 8 * len(zeros))], None))
        assert push.post("v1/shards", file).status_code == 200, "what has been counted is not counted twice"
    finally:
        house.ask("operator", "PUT", quota, json={"max_bytes": None, "max_releases": None}).raise_for_status()
