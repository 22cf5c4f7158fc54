"""Commits over the hub API, byte by byte: details that the client hides, races, repetitions and lost answers."""

import base64
import hashlib
import itertools
import json
import time
import tracemalloc
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

import httpx2
import numpy as np
import pytest
from safetensors.numpy import save

from registry.api.hub.push import permit_of
from registry.database.tables import Blob, Namespace, Repository
from registry.domain.access.audit import Actor
from registry.domain.catalog.commits import EMPTY
from registry.errors import NotFound
from registry.formats.manifest import MAX_FILES, ManifestFile
from registry.formats.references import Digest, parse_repository
from registry.transfer import commits as transfers
from registry.transfer import fsck
from registry.transfer import lfs as lfs_transfers
from registry.transfer.collect import collect
from registry.transfer.commits import MAX_LINES, _CommitLines
from registry.transfer.lfs import PermittedAct
from tests import services
from tests.access.house import House, new_house
from tests.scenarios.world import SMALL_PARTS

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
HEADER = {"key": "header", "value": {"summary": 'A "content": "title', "description": "why"}}


@pytest.fixture(scope="module", params=services.PAIRINGS)
def house(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Generator[House]:
    parts = {} if request.param == services.PAIRINGS[0] else SMALL_PARTS
    house = new_house(request.param, tmp_path_factory.mktemp("house"), **parts)
    yield house
    house.close()


@pytest.fixture
def named(house: House, request: pytest.FixtureRequest) -> str:
    """An empty repository of the test's own."""
    name = f"r{hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:10]}"
    created = house.ask("publisher", "POST", "/api/repos/create", json={"name": name, "organization": "acme"})
    assert created.json()["url"] == f"http://registry/acme/{name}"
    return f"acme/{name}"


def file(path: str, content: bytes) -> dict[str, Any]:
    encoded = base64.b64encode(content).decode()
    return {"key": "file", "value": {"content": encoded, "path": path, "encoding": "base64"}}


def lfs(path: str, content: bytes) -> dict[str, Any]:
    oid = hashlib.sha256(content).hexdigest()
    return {"key": "lfsFile", "value": {"path": path, "algo": "sha256", "oid": oid, "size": len(content)}}


def deleted(path: str, *, folder: bool = False) -> dict[str, Any]:
    return {"key": "deletedFolder" if folder else "deletedFile", "value": {"path": path}}


def commit(
    house: House, named: str, *lines: dict[str, Any], parent: str | None = None, chunk: int = 0
) -> httpx2.Response:
    header = {"key": "header", "value": {**HEADER["value"], **({"parentCommit": parent} if parent else {})}}
    body = b"".join(json.dumps(line).encode() + b"\n" for line in (header, *lines))
    headers = {"Content-Length": str(len(body))}
    chunks = _chunks(body, chunk or len(body))
    return house.ask("publisher", "POST", f"/api/models/{named}/commit/main", content=chunks, headers=headers)


def _chunks(body: bytes, size: int) -> Iterator[bytes]:
    return (body[start : start + size] for start in range(0, len(body), size))


def paths(house: House, named: str, revision: str = "main") -> list[str]:
    info = house.ask("reader", "GET", f"/api/models/{named}/revision/{revision}").raise_for_status().json()
    return [sibling["rfilename"] for sibling in info["siblings"]]


def head(house: House, named: str) -> str:
    return str(house.ask("reader", "GET", f"/api/models/{named}").raise_for_status().json()["sha"])


def read(house: House, named: str, path: str) -> bytes:
    answer = house.ask("reader", "GET", f"/{named}/resolve/main/{path}")
    return httpx2.get(answer.headers["Location"]).content if answer.status_code == 307 else answer.content


@pytest.mark.parametrize("chunk", [1, 7, 100_000])
def test_a_commit_is_read_in_whatever_pieces_it_comes(house: House, named: str, chunk: int) -> None:
    contents = {"a.dat": bytes(range(256)) * 3, "empty.txt": b"", "deep/b.txt": b"b"}
    lines = [file(path, content) for path, content in contents.items()]
    answer = commit(house, named, *lines, chunk=chunk)
    assert answer.status_code == 200, answer.text
    oid = answer.json()["commitOid"]
    assert answer.json()["commitUrl"] == f"http://registry/{named}/commit/{oid}"
    assert {path: read(house, named, path) for path in paths(house, named)} == contents
    assert head(house, named) == oid


def test_files_of_the_same_content_come_in_one_commit(house: House, named: str) -> None:
    """PEFT saves each adapter of a model in a directory of its own, with the same configuration and card."""
    contents = {CONFIG: b"{}", f"prod/{CONFIG}": b"{}", "README.md": b"x", "prod/README.md": b"x"}
    commit(house, named, *(file(path, content) for path, content in contents.items())).raise_for_status()
    assert {path: read(house, named, path) for path in paths(house, named)} == contents


def test_operations_apply_in_their_order(house: House, named: str) -> None:
    commit(house, named, file("logs/a.txt", b"a"), file("logs/b.txt", b"b"), file("keep.txt", b"k")).raise_for_status()
    commit(house, named, deleted("logs/", folder=True), file("logs/c.txt", b"c")).raise_for_status()
    assert paths(house, named) == ["keep.txt", "logs/c.txt"]
    absent = commit(house, named, deleted("logs/a.txt"))
    assert (absent.status_code, absent.headers["X-Error-Code"]) == (404, "EntryNotFound")
    assert absent.headers["X-Error-Message"].startswith("A file with this name doesn't exist")


def test_of_commits_with_one_parent_one_is_made(house: House, named: str) -> None:
    first = commit(house, named, file("a.txt", b"a")).json()["commitOid"]
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda n: commit(house, named, file(f"{n}.txt", b"x"), parent=first[:7]), range(6)))
    assert sorted(answer.status_code for answer in answers) == [200, *[412] * 5]
    assert len(paths(house, named)) == 2
    winner = next(number for number, answer in enumerate(answers) if answer.status_code == 200)
    again = commit(house, named, file(f"{winner}.txt", b"x"), parent=first)
    assert (again.status_code, again.json()["commitOid"]) == (200, head(house, named)), "the client lost the answer"
    titles = house.ask("reader", "GET", f"/api/models/{named}/commits/main").json()
    assert len(titles) == 2


def test_commits_without_a_parent_lose_nothing(house: House, named: str) -> None:
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda n: commit(house, named, file(f"{n}.txt", b"x")), range(6)))
    assert [answer.status_code for answer in answers] == [200] * 6
    assert paths(house, named) == [f"{number}.txt" for number in range(6)]


def test_an_empty_repository_has_a_commit(house: House, named: str) -> None:
    assert (head(house, named), paths(house, named)) == (EMPTY, [])
    assert commit(house, named, file("a.txt", b"a"), parent=EMPTY).status_code == 200


@pytest.mark.parametrize(
    ("line", "status", "words"),
    [
        ({"key": "symlink", "value": {"path": "x"}}, 400, "'symlink' is not supported"),
        ({"key": "file", "value": {"path": "x"}}, 400, "is not supported"),
        ({"key": "file", "value": {"content": "###", "path": "x"}}, 400, "not base64"),
        ({"key": "file", "value": {"content": "text", "path": "x", "encoding": "utf-8"}}, 400, "'utf-8' is not"),
        ({"key": "lfsFile", "value": {"path": "x", "oid": "abc"}}, 400, "Invalid SHA-256"),
        ({"key": "file", "value": {"content": "eA==", "path": "../x"}}, 422, "is not a valid path"),
        ({"key": "file", "value": {"content": "eA==", "path": "model.pkl"}}, 422, "model.pkl"),
        ({"key": "file", "value": {"content": "eA==", "path": "a.safetensors"}}, 422, "a.safetensors"),
        ({"key": "file", "value": {"content": "gASVAA==", "path": "innocent.json"}}, 422, "innocent.json"),
        ({"key": "lfsFile", "value": {"path": "x", "oid": "0" * 64, "size": "1"}}, 400, "size must be a whole number"),
        ({"key": "header", "value": {"summary": "a\0b"}}, 400, "Leave it out"),
        ({"key": "header", "value": {"summary": "x", "parentCommit": "%"}}, 400, "parentCommit must be a commit"),
        ([1, 2], 400, "must be an object"),
    ],
)
def test_a_line_that_cannot_be_is_refused_and_nothing_recorded(
    house: House, named: str, line: Any, status: int, words: str
) -> None:
    answer = commit(house, named, line)
    assert (answer.status_code, words in answer.headers["X-Error-Message"]) == (status, True), answer.text
    assert head(house, named) == EMPTY


@pytest.mark.parametrize("line", [b"\n", json.dumps(deleted("absent")).encode() + b"\n"], ids=["empty", "deletion"])
def test_a_commit_of_many_lines_is_refused_before_it_costs_much(house: House, named: str, line: bytes) -> None:
    """Each line used to be searched for in everything received: a megabyte of lines took more than a minute."""
    lines = _CommitLines([line * MAX_LINES], Path())
    started = time.thread_time()
    for _ in lines:
        pass
    assert time.thread_time() - started < 2
    answer = commit(house, named, *[deleted("absent")] * MAX_LINES)
    assert (answer.status_code, answer.json()["code"]) == (413, "too_many_files"), answer.text


@pytest.mark.parametrize("path", ["preupload/main", "objects"])
def test_a_plan_of_more_files_than_a_release_has_is_refused(house: House, named: str, path: str) -> None:
    many = [{"path": str(number), "oid": f"{number:064x}", "size": 2} for number in range(MAX_FILES + 1)]
    url = f"/api/models/{named}/{path}" if "/" in path else f"/{named}.git/info/lfs/objects/batch"
    answer = house.ask("publisher", "POST", url, json={"files": many, "objects": many})
    assert (answer.status_code, str(MAX_FILES) in answer.headers["X-Error-Message"]) == (422, True), answer.text


def test_a_commit_that_is_refused_has_not_stored_its_files(house: House, named: str) -> None:
    def is_stored(content: bytes) -> bool:
        with house.resources.read() as session:
            return session.get(Blob, hashlib.sha256(content).hexdigest()) is not None

    many = [file(f"{number}.txt", f"{named} {number}".encode()) for number in range(MAX_FILES + 1)]
    for repository, lines, parent, code in (
        (named, many, None, "bad_manifest"),
        (named, [file("a.txt", b"stale " + named.encode())], "0" * 40, "head_moved"),
        ("acme/absent", [file("a.txt", b"absent " + named.encode())], None, "repository_unknown"),
    ):
        assert commit(house, repository, *lines, parent=parent).json()["code"] == code
    assert not any(map(is_stored, (f"{named} 0".encode(), b"stale " + named.encode(), b"absent " + named.encode())))


def announce(
    house: House, named: str, content: bytes, caller: str = "publisher", *, transfers: Sequence[str] = ("basic",)
) -> dict[str, Any]:
    """The client's instructions for the file."""
    oid = hashlib.sha256(content).hexdigest()
    listed = {"objects": [{"oid": oid, "size": len(content)}], "transfers": [*transfers]}
    answer = house.ask(caller, "POST", f"/{named}.git/info/lfs/objects/batch", json=listed).raise_for_status()
    return dict(answer.json()["objects"][0].get("actions", {}))


def send(house: House, method: str, url: str, content: bytes = b"") -> httpx2.Response:
    """Sends without a token, to the registry or to its store."""
    if not url.startswith("http://registry/"):
        return httpx2.request(method, url, content=content)
    return house.ask("nobody", method, url.removeprefix("http://registry"), content=content)


def test_a_file_is_sent_before_its_commit_by_its_own_address(house: House, named: str) -> None:
    content = f"weights of {named}".encode()
    wrong = b"x" * len(content)
    assert commit(house, named, lfs("w.dat", content)).status_code == 404, "it was not sent yet"
    actions = announce(house, named, content)
    sent = send(house, "PUT", actions["upload"]["href"], wrong)
    refused = send(house, "POST", actions["verify"]["href"]) if "verify" in actions else sent
    assert (refused.status_code, refused.json()["code"]) == (422, "digest_differs")
    assert commit(house, named, lfs("w.dat", content)).status_code == 404
    assert not send(house, "PUT", actions["upload"]["href"], content).is_error
    for _ in range(2):  # the answer may be lost
        assert not send(house, "POST", actions["verify"]["href"]).is_error if "verify" in actions else True
    assert announce(house, named, content) == {}, "it is there"
    commit(house, named, lfs("w.dat", content)).raise_for_status()
    assert read(house, named, "w.dat") == content


def test_an_address_serves_for_its_file_alone_and_for_its_time(house: House, named: str) -> None:
    content = f"more weights of {named}".encode()
    actions = announce(house, named, content)
    own = next(url for url in (action["href"] for action in actions.values()) if url.startswith("http://registry/"))
    method = "POST" if "verify" in actions else "PUT"
    parts = urlsplit(own)
    query = dict(parse_qsl(parts.query))
    other = hashlib.sha256(b"other").hexdigest()
    for changed in (
        own.replace(hashlib.sha256(content).hexdigest(), other),
        own.replace("/acme/", "/other/"),
        parts._replace(query=urlencode({**query, "expires": int(query["expires"]) + 1})).geturl(),
        parts._replace(query=urlencode({**query, "act": "send" if query["act"] == "finish" else "finish"})).geturl(),
        parts._replace(query=urlencode({**query, "multipart": "another"})).geturl(),
    ):
        answer = send(house, method, changed, content)
        assert (answer.status_code, answer.json()["code"]) == (404, "upload_address_invalid"), changed
    digest, act = hashlib.sha256(content).hexdigest(), PermittedAct(query["act"])
    early = permit_of("acme", digest, act, int(query["expires"]), "")
    given = {"signature": query["signature"], "multipart_id": query.get("multipart", ""), "token_id": query["token"]}
    permit = replace(early, **given)
    hour = replace(house.resources, clock=lambda: datetime.now(UTC) + timedelta(minutes=59))
    late = replace(house.resources, clock=lambda: datetime.now(UTC) + timedelta(days=1, minutes=1))
    late = late if method == "POST" else replace(late, clock=lambda: datetime.now(UTC) + timedelta(minutes=61))
    with pytest.raises(NotFound, match="has expired"):
        lfs_transfers.receive(late, lfs_transfers.permitted(late, permit), [content], len(content))
    if method == "PUT":
        lfs_transfers.receive(hour, lfs_transfers.permitted(hour, permit), [content], len(content))


@pytest.mark.parametrize("large", [12 << 20])
def test_a_large_file_goes_in_parts_where_the_store_takes_them(house: House, named: str, large: int) -> None:
    content = bytes(large) + named.encode()
    actions = announce(house, named, content, transfers=("basic", "multipart"))
    header, href = actions["upload"]["header"], actions["upload"]["href"]
    if "chunk_size" in header:
        size = int(header["chunk_size"])
        urls = [header[name] for name in sorted(header) if name.isdigit()]
        assert len(urls) == -(-len(content) // size) > 1
        pieces = [content[start : start + size] for start in range(0, len(content), size)]
        assert send(house, "PUT", urls[0], pieces[0]).headers["ETag"]
        assert send(house, "POST", href).json()["code"] == "upload_incomplete"
        for url, piece in zip(urls[1:], pieces[1:], strict=True):
            assert send(house, "PUT", url, piece).headers["ETag"]
        for _ in range(2):
            assert send(house, "POST", href).status_code == 200
    else:
        assert send(house, "PUT", href, content).status_code == 200
    commit(house, named, lfs("w.dat", content)).raise_for_status()
    assert hashlib.sha256(read(house, named, "w.dat")).digest() == hashlib.sha256(content).digest()


def test_no_file_is_in_the_memory_of_the_server(house: House, named: str) -> None:
    """Neither one inside a commit, nor one before it, nor one that the store has received."""
    size = 24 << 20
    piece = bytes(range(256)) * 256
    inline = base64.b64encode(piece * 3)  # of a length without padding
    content = hashlib.sha256()
    for _ in range(size // len(piece)):
        content.update(piece)
    digest = content.hexdigest()
    listed = [ManifestFile("w.dat", size, Digest(digest))]
    publisher = Actor("publisher", datetime.now(UTC), {"acme": "publisher"})

    def body() -> Iterator[bytes]:
        yield json.dumps(HEADER).encode() + b'\n{"key": "file", "value": {"path": "inline.dat", "content": "'
        yield from itertools.repeat(inline, size // len(piece) // 3)
        yield b'", "encoding": "base64"}}\n'

    sending = lfs_transfers.plan(house.resources, publisher, "acme", listed, in_parts=False)[Digest(digest)]
    assert sending is not None
    pieces = itertools.repeat(piece, size // len(piece))
    if sending.put:
        headers = {"Content-Length": str(size)}
        httpx2.put(sending.put, content=pieces, headers=headers, timeout=60).raise_for_status()
    tracemalloc.start()
    try:
        if sending.send:
            lfs_transfers.receive(house.resources, lfs_transfers.permitted(house.resources, sending.send), pieces, size)
        if sending.finish:
            lfs_transfers.finish(house.resources, sending.finish)
        transfers.receive(house.resources, publisher, parse_repository(named), body())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < size / 2, f"{peak:,} bytes"


def test_an_adapter_that_does_not_fit_is_refused_at_the_commit_that_completes_it(house: House, named: str) -> None:
    weights = save({"base_model.model.absent.lora_A.weight": np.zeros((2, 2), np.float32)})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["absent"]}

    def configured(base: str) -> httpx2.Response:
        content = json.dumps({**config, "base_model_name_or_path": base}).encode()
        return commit(house, named, file(CONFIG, content))

    assert commit(house, named, file(WEIGHTS, weights)).status_code == 200, "its configuration may come later"
    refused = configured("tiny")
    assert (refused.status_code, "absent" in refused.headers["X-Error-Message"]) == (422, True), refused.text
    assert paths(house, named) == [WEIGHTS]
    unknown = configured("elsewhere/unknown")
    assert unknown.status_code == 200, "the base may be registered later"
    assert "its base elsewhere/unknown is not registered" in unknown.headers["X-HF-Warning"]
    assert commit(house, named, file("README.md", b"# A card")).status_code == 200
    card = commit(house, named, file("README.md", b"---\nbase_model: tiny\n---\n"))
    assert (card.status_code, "absent" in card.headers["X-Error-Message"]) == (422, True), "the card names the base"
    tag = house.ask("publisher", "POST", f"/api/models/{named}/tag/main", json={"tag": "1.0.0"})
    assert (tag.status_code, tag.json()["code"]) == (404, "base_unknown")


def test_a_digest_alone_gives_no_access_to_another_namespace(house: House, named: str) -> None:
    content = b"weights of other"
    answer = commit(house, named, lfs("stolen.safetensors", content))
    assert (answer.status_code, answer.json()["code"]) == (404, "blob_missing")
    assert announce(house, named, content), "nor does the answer say that somebody has it"


def test_gc_keeps_what_a_commit_names(house: House, named: str) -> None:
    commit(house, named, file("a.txt", b"only in a commit")).raise_for_status()
    commit(house, named, deleted("a.txt"), file("b.txt", b"later")).raise_for_status()
    old = house.ask("reader", "GET", f"/api/models/{named}/commits/main").json()[1]["id"]
    collect(house.resources, grace=timedelta(0))
    assert paths(house, named, old) == ["a.txt"]
    answer = house.ask("reader", "GET", f"/{named}/resolve/{old}/a.txt")
    content = httpx2.get(answer.headers["Location"]).content if answer.status_code == 307 else answer.content
    assert content == b"only in a commit"


def test_a_plan_leaves_out_what_trainers_keep_and_refuses_other_pickles(house: House, named: str) -> None:
    def plan(*names: str) -> httpx2.Response:
        body = {"files": [{"path": name, "size": 5 << 20, "sample": ""} for name in names]}
        path = f"/api/models/{named}/preupload/main"
        return house.ask("publisher", "POST", path, json=body)

    answer = plan("adapter_model.safetensors", "training_args.bin", ".gitattributes")
    assert [(file["uploadMode"], file["shouldIgnore"]) for file in answer.json()["files"]] == [
        ("lfs", False), ("lfs", True), ("lfs", True),
    ]  # fmt: skip
    assert "training_args.bin, .gitattributes" in answer.headers["X-HF-Warning"]
    assert (plan("model.pkl").status_code, plan(".envrc").status_code) == (422, 422)
    other = house.ask("publisher", "POST", f"/api/models/{named}/preupload/prod", json={"files": []})
    assert (other.status_code, "Commits go to main" in other.headers["X-Error-Message"]) == (400, True)


def test_a_plan_names_what_main_has_so_that_the_client_does_not_send_it_again(house: House, named: str) -> None:
    contents = {"a.json": b"{}", "large.dat": bytes(2 << 20), "other.json": b"[]"}
    commit(house, named, *[file(path, content) for path, content in contents.items()]).raise_for_status()

    def plan() -> dict[str, str | None]:
        sizes = {"a.json": 2, "large.dat": 2 << 20, "other.json": 3, "new.json": 2}
        body = {"files": [{"path": path, "size": size} for path, size in sizes.items()]}
        answer = house.ask("publisher", "POST", f"/api/models/{named}/preupload/main", json=body)
        return {file["path"]: file.get("oid") for file in answer.json()["files"]}

    small = "9e26dfeeb6e641a33dae4961196235bdb965b21b"  # git hash-object
    large = hashlib.sha256(contents["large.dat"]).hexdigest()
    expected = {"a.json": small, "large.dat": large, "other.json": None, "new.json": None}
    assert plan() == expected
    house.resources.store.delete(Digest(large))
    assert plan() == expected | {"large.dat": None}, "lost bytes must be sent again"


def test_a_repository_is_as_private_as_its_namespace(house: House) -> None:
    def create(**body: object) -> httpx2.Response:
        return house.ask("publisher", "POST", "/api/repos/create", json=body)

    assert create(name="Mixed-Case", organization="Acme", private=False).headers["X-HF-Warning"].startswith("private; ")
    again = create(name="mixed-case", organization="acme")
    assert (again.status_code, again.json()["url"]) == (409, "http://registry/acme/mixed-case")
    assert create(name="x", organization="open", private=True).status_code == 403
    assert create(name="x", organization="open", visibility="public").status_code == 200


def test_a_refusal_to_create_is_shown_in_its_words(house: House) -> None:
    """For a missing repository the client has its own message about creating it."""

    def refused(**body: str) -> tuple[int, str]:
        answer = house.ask("publisher", "POST", "/api/repos/create", json=body)
        assert "X-Error-Code" not in answer.headers
        return answer.status_code, answer.headers["X-Error-Message"]

    status, words = refused(name="x", organization="other")
    assert (status, "amespace other does not exist, or you have no access" in words) == (404, True)
    status, words = refused(name="mine")
    assert (status, "Write it as namespace/name" in words) == (400, True)
    status, words = refused(name="tables", organization="acme", type="dataset")
    assert (status, "no repositories of type 'dataset'" in words) == (404, True)


def test_an_empty_repository_has_an_empty_tree(house: House, named: str) -> None:
    """A push that replaces files lists them first."""
    tree = house.ask("reader", "GET", f"/api/models/{named}/tree/main?recursive=true")
    assert (tree.status_code, tree.json()) == (200, [])
    tree = house.ask("reader", "GET", f"/api/models/{named}/tree/{EMPTY}")
    assert (tree.status_code, tree.json()) == (200, []), "the commit that a snapshot pins"
    assert house.ask("reader", "GET", f"/api/models/{named}/tree/main/deep").headers["X-Error-Code"] == "EntryNotFound"


def test_a_release_made_elsewhere_is_a_step_of_main(house: House) -> None:
    """`acme/sql` has releases and no commit: the first commit starts from the newest release."""
    before = head(house, "acme/sql")
    commit(house, "acme/sql", file("README.md", b"# A card"), parent=before).raise_for_status()
    assert paths(house, "acme/sql") == ["README.md", "weights.safetensors"]
    assert paths(house, "acme/sql", "1.1.0") == ["weights.safetensors"]
    branch = house.ask("releaser", "POST", "/api/models/acme/sql/branch/canary", json={"startingPoint": "1.0.0"})
    assert branch.status_code == 200, branch.text
    again = house.ask("releaser", "POST", "/api/models/acme/sql/branch/canary", json={"startingPoint": "1.0.0"})
    assert (again.status_code, again.json()["code"]) == (409, "channel_exists"), "clients pass over it with exist_ok"
    main = house.ask("publisher", "POST", "/api/models/acme/sql/branch/main", json={})
    assert (main.status_code, main.json()["code"]) == (409, "channel_exists"), "as push_to_hub(revision='main') asks"
    assert house.ask("releaser", "POST", "/api/models/acme/sql/branch/next", json={}).status_code == 400
    for name in ("9.9.9", "v2.0.0", "c0ffee0"):
        answer = house.ask("releaser", "POST", f"/api/models/acme/sql/branch/{name}", json={"startingPoint": "v1.0.0"})
        assert (answer.status_code, "it reads as a" in answer.headers["X-Error-Message"]) == (400, True), name
    refs = house.ask("reader", "GET", "/api/models/acme/sql/refs").json()
    assert {branch["name"] for branch in refs["branches"]} == {"main", "prod", "canary"}
    gone = house.ask("releaser", "DELETE", "/api/models/acme/sql/tag/1.0.0")
    assert (gone.status_code, "yanked" in gone.headers["X-Error-Message"]) == (403, True)


def test_what_cannot_be_undone_is_refused_in_words(house: House) -> None:
    def ask(method: str, path: str, **body: object) -> tuple[int, str]:
        answer = house.ask("admin", method, path, json=body)
        return answer.status_code, answer.headers["X-Error-Message"]

    status, words = ask("DELETE", "/api/repos/delete", name="SQL", organization="acme")
    assert (status, "acme/sql cannot be deleted" in words) == (403, True)
    assert ask("DELETE", "/api/repos/delete", name="ghost", organization="acme")[0] == 404
    status, words = ask("POST", "/api/repos/move", fromRepo="acme/sql", toRepo="acme/other", type="model")
    assert (status, "cannot be renamed" in words) == (403, True)
    status, words = ask("PUT", "/api/models/acme/sql/settings", private=False)
    assert (status, "acme/sql is private, as everything in acme" in words) == (403, True)
    status, words = ask("PUT", "/api/models/open/sql/settings", visibility="private")
    assert (status, "is public" in words) == (403, True)
    status, words = ask("DELETE", "/api/models/acme/sql/branch/prod")
    assert (status, "channels keep their history" in words) == (403, True)


def test_names_that_the_server_or_the_clients_need_are_refused(house: House) -> None:
    for namespace in ("search", "api", "v2", "oauth", "xet", "assets", "robots.txt"):
        answer = house.ask("operator", "POST", "/api/repos/create", json={"name": "x", "organization": namespace})
        assert (answer.status_code, answer.json()["code"]) == (400, "namespace_reserved"), namespace
        assert house.ask("operator", "PUT", f"/v1/namespaces/{namespace}", json={}).status_code == 400
    answer = house.ask("operator", "POST", "/api/repos/create", json={"name": "sql.git", "organization": "acme"})
    assert (answer.status_code, "ends in .git" in answer.headers["X-Error-Message"]) == (400, True)
    with house.resources.write() as session:  # from before they were refused
        settings = {"public": False, "require_signature": False, "signing_keys": [], "created_by": "x"}
        session.add(Namespace(name="static", created_at=datetime.now(UTC), **settings))
        session.add(Repository(namespace="static", name="a.git", kind="adapter", created_at=datetime.now(UTC)))
    reserved = [(row.code, row.severity, row.subject) for row in fsck.check(house.resources) if "reserved" in row.code]
    assert reserved == [("namespace_reserved", "notice", "static"), ("name_reserved", "notice", "static/a.git")]
