"""Commits over the hub API, byte by byte: what the client's own errors hide, races, repetitions and lost answers."""

import base64
import hashlib
import json
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import httpx2
import pytest

from registry.domain.catalog.commits import EMPTY
from registry.transfer.collect import collect
from tests import services
from tests.access.house import House, build_house, new_environment

HEADER = {"key": "header", "value": {"summary": 'A "content": "title', "description": "why"}}


@pytest.fixture(scope="module", params=services.PAIRINGS)
def house(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Generator[House]:
    house = build_house(new_environment(request.param, tmp_path_factory.mktemp("house")))
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
    return [one["rfilename"] for one in info["siblings"]]


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
        ({"key": "lfsFile", "value": {"path": "x", "oid": "abc"}}, 400, "not a SHA-256"),
        ({"key": "file", "value": {"content": "eA==", "path": "../x"}}, 422, "cannot be a file"),
        ({"key": "file", "value": {"content": "eA==", "path": "model.pkl"}}, 422, "model.pkl"),
        ({"key": "file", "value": {"content": "eA==", "path": "a.safetensors"}}, 422, "a.safetensors"),
        ({"key": "file", "value": {"content": "gASVAA==", "path": "innocent.json"}}, 422, "innocent.json"),
        ({"key": "lfsFile", "value": {"path": "x", "oid": "0" * 64, "size": "1"}}, 400, "size is not a number"),
        ({"key": "header", "value": {"summary": "a\0b"}}, 400, "NUL"),
        ({"key": "header", "value": {"summary": "x", "parentCommit": "%"}}, 400, "not a commit"),
        ([1, 2], 400, "not an object"),
    ],
)
def test_a_line_that_cannot_be_is_refused_and_nothing_recorded(
    house: House, named: str, line: Any, status: int, words: str
) -> None:
    answer = commit(house, named, line)
    assert (answer.status_code, words in answer.headers["X-Error-Message"]) == (status, True), answer.text
    assert head(house, named) == EMPTY


def test_a_file_is_sent_before_its_commit_by_its_own_address(house: House, named: str) -> None:
    content = f"weights of {named}".encode()
    listed = {"objects": [{"oid": hashlib.sha256(content).hexdigest(), "size": len(content)}]}

    def action() -> dict[str, Any]:
        answer = house.ask("publisher", "POST", f"/{named}.git/info/lfs/objects/batch", json=listed)
        assert answer.json()["transfer"] == "basic"
        return dict(answer.json()["objects"][0].get("actions", {}))

    assert commit(house, named, lfs("w.dat", content)).status_code == 404, "it was not sent yet"
    address = httpx2.URL(action()["upload"]["href"]).path
    wrong = house.ask("nobody", "PUT", address, content=b"x" * len(content))
    assert (wrong.status_code, wrong.json()["code"]) == (422, "digest_differs")
    assert house.ask("nobody", "PUT", address, content=content).status_code == 200
    assert house.ask("nobody", "PUT", "/api/lfs/unknown", content=content).status_code == 404
    assert action() == {}, "it is there"
    commit(house, named, lfs("w.dat", content)).raise_for_status()
    assert read(house, named, "w.dat") == content


def test_a_digest_alone_gives_no_access_to_another_namespace(house: House, named: str) -> None:
    content = b"weights of other"
    answer = commit(house, named, lfs("stolen.safetensors", content))
    assert (answer.status_code, answer.json()["code"]) == (404, "blob_missing")
    listed = {"objects": [{"oid": hashlib.sha256(content).hexdigest(), "size": len(content)}]}
    planned = house.ask("publisher", "POST", f"/{named}.git/info/lfs/objects/batch", json=listed).json()
    assert "actions" in planned["objects"][0], "nor does the answer say that somebody has it"


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
    def plan(*names: str, agent: str = "hf_hub/0.24.7") -> httpx2.Response:
        body = {"files": [{"path": name, "size": 5 << 20, "sample": ""} for name in names]}
        path = f"/api/models/{named}/preupload/main"
        return house.ask("publisher", "POST", path, json=body, headers={"User-Agent": agent})

    answer = plan("adapter_model.safetensors", "training_args.bin", ".gitattributes")
    assert [(one["uploadMode"], one["shouldIgnore"]) for one in answer.json()["files"]] == [
        ("lfs", False), ("lfs", True), ("lfs", True),
    ]  # fmt: skip
    assert "training_args.bin, .gitattributes" in answer.headers["X-HF-Warning"]
    assert plan("a.dat", agent="x; hf_hub/2.4.0; y").json()["files"][0]["uploadMode"] == "regular"
    assert (plan("model.pkl").status_code, plan(".envrc").status_code) == (422, 422)
    other = house.ask("publisher", "POST", f"/api/models/{named}/preupload/prod", json={"files": []})
    assert (other.status_code, "Commits go to main" in other.headers["X-Error-Message"]) == (400, True)


def test_a_repository_is_as_private_as_its_namespace(house: House) -> None:
    def create(**body: object) -> httpx2.Response:
        return house.ask("publisher", "POST", "/api/repos/create", json=body)

    assert create(name="Mixed-Case", organization="Acme", private=False).headers["X-HF-Warning"].startswith("private; ")
    again = create(name="mixed-case", organization="acme")
    assert (again.status_code, again.json()["url"]) == (409, "http://registry/acme/mixed-case")
    assert create(name="x", organization="open", private=True).status_code == 403
    assert create(name="x", organization="open", visibility="public").status_code == 200
    assert create(name="x", organization="other").status_code == 404


def test_a_release_made_elsewhere_is_a_step_of_main(house: House) -> None:
    """`acme/sql` has releases and no commit: the first commit starts from the newest release."""
    before = head(house, "acme/sql")
    commit(house, "acme/sql", file("README.md", b"# A card"), parent=before).raise_for_status()
    assert paths(house, "acme/sql") == ["README.md", "weights.safetensors"]
    assert paths(house, "acme/sql", "1.1.0") == ["weights.safetensors"]
    branch = house.ask("releaser", "POST", "/api/models/acme/sql/branch/canary", json={"startingPoint": "1.0.0"})
    assert branch.status_code == 200, branch.text
    assert house.ask("releaser", "POST", "/api/models/acme/sql/branch/canary", json={"startingPoint": "1.0.0"}).is_error
    assert house.ask("releaser", "POST", "/api/models/acme/sql/branch/next", json={}).status_code == 400
    refs = house.ask("reader", "GET", "/api/models/acme/sql/refs").json()
    assert {one["name"] for one in refs["branches"]} == {"main", "prod", "canary"}
    gone = house.ask("releaser", "DELETE", "/api/models/acme/sql/tag/1.0.0")
    assert (gone.status_code, "yanked" in gone.headers["X-Error-Message"]) == (422, True)
