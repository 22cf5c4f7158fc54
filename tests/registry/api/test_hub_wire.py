"""Answers of the hub API, byte by byte: facts that `huggingface_hub` relies on and does not show."""

import hashlib
import json
from collections.abc import Generator, Mapping
from datetime import UTC, datetime

import httpx2
import pytest

from registry.database.tables import Blob, BlobHolder
from registry.domain.catalog import bases, releases
from registry.domain.catalog.releases import NewRelease
from registry.domain.catalog.repositories import Kind
from registry.domain.channels import promotions, withdrawals
from registry.domain.channels.moves import PromotionRequest
from registry.errors import Conflict
from registry.formats.manifest import ManifestFile
from registry.formats.references import Digest, RepositoryName, parse_version
from tests import services
from tests.access.house import FACTS, HOST, PRIVATE, House, new_house

NOW = datetime(2026, 1, 1, tzinfo=UTC)
ODD = "sub dir/ünï+co#de%41.txt"
ODD_QUOTED = "sub%20dir/%C3%BCn%C3%AF%2Bco%23de%2541.txt"
FILES = {
    "1.0.0": {"adapter_config.json": b"{}", "weights.safetensors": b"one", ODD: b"odd", "sub dir/deep/x.txt": b"x"},
    "1.1.0": {"adapter_config.json": b"{}", "weights.safetensors": b"two", ODD: b"odd", "sub dir/deep/x.txt": b"x"},
    "1.2.0": {"adapter_config.json": b"{}", "weights.safetensors": b"bad"},
    "2.0.0-rc.1": {"adapter_config.json": b"{}", "weights.safetensors": b"new"},
}


@pytest.fixture(scope="module", params=services.ONE_PAIRING)
def house(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Generator[House]:
    """`acme/tables` has 1.0.0 in prod, 1.1.0, a yanked 1.2.0 and a candidate; `acme/tables.lite` is another one."""
    house = new_house(request.param, tmp_path_factory.mktemp("house"))
    for version, files in FILES.items():
        _publish(house, "tables", version, files)
    _publish(house, "tables.lite", "1.0.0", {"weights.safetensors": b"lite"})
    _publish(house, "early", "1.0.0-rc.1", {"weights.safetensors": b"early"})
    with house.resources.write() as session:
        promotions.request(session, HOST, PromotionRequest(_named("tables"), parse_version("1.0.0"), "prod"))
        withdrawals.yank(session, HOST, releases.find(session, _named("tables"), parse_version("1.2.0")), "wrong data")
    yield house
    house.close()


def _named(name: str) -> RepositoryName:
    return RepositoryName(PRIVATE, name)


def _publish(house: House, name: str, version: str, files: Mapping[str, bytes]) -> None:
    resources, listed = house.resources, []
    with resources.write() as session:
        for path, content in files.items():
            sha256 = Digest(hashlib.sha256(content).hexdigest())
            if resources.store.stat(sha256) is None:
                file = resources.work_directory / "file"
                file.write_bytes(content)
                resources.store.put(sha256, file)
                session.add(Blob(sha256=sha256, size_bytes=len(content), created_at=NOW))
                session.flush()
                session.add(BlobHolder(sha256=sha256, namespace=PRIVATE))
            listed.append(ManifestFile(path, len(content), sha256))
        session.flush()
        base, parsed = bases.find(session, "tiny").digest, parse_version(version)
        new = NewRelease(_named(name), Kind.ADAPTER, parsed, None, listed, base, FACTS, notes=f"Notes of {version}")
        releases.publish(session, HOST, new)


def ask(house: House, path: str, method: str = "GET", **headers: str) -> httpx2.Response:
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    return house.ask("reader", method, path, headers=sent)


def commit_of(house: House, revision: str, repository: str = "acme/tables") -> str:
    return str(ask(house, f"/api/models/{repository}/revision/{revision}").raise_for_status().json()["sha"])


def test_a_revision_is_a_version_a_channel_a_commit_or_main(house: House) -> None:
    shas = {revision: commit_of(house, revision) for revision in ("1.0.0", "1.1.0", "1.2.0", "2.0.0-rc.1")}
    assert len(set(shas.values())) == 4
    assert all(len(sha) == 40 and int(sha, 16) for sha in shas.values())
    assert commit_of(house, "main") == shas["1.1.0"], "the highest that is stable and not yanked"
    assert ask(house, "/api/models/acme/tables").json()["sha"] == shas["1.1.0"]
    assert commit_of(house, "prod") == commit_of(house, "v1.0.0") == shas["1.0.0"]
    for digits in (7, 39, 40):
        assert commit_of(house, shas["1.0.0"][:digits]) == shas["1.0.0"]
    assert commit_of(house, "main", "acme/early") == commit_of(house, "1.0.0-rc.1", "acme/early")


def test_a_name_with_a_revision_behind_it_is_read_like_the_repository(house: House) -> None:
    assert commit_of(house, "main", "acme/tables.prod") == commit_of(house, "prod")
    assert commit_of(house, "main", "acme/tables.v1.0.0") == commit_of(house, "main", "acme/tables.1.0.0")
    assert commit_of(house, "main", "acme/tables.2.0.0-rc.1") == commit_of(house, "2.0.0-rc.1")
    assert commit_of(house, "1.1.0", "acme/tables.prod") == commit_of(house, "1.1.0"), "a revision that is named wins"
    assert commit_of(house, "main", "acme/tables.lite") == commit_of(house, "1.0.0", "acme/tables.lite")
    assert ask(house, "/api/models/acme/tables.prod").json()["id"] == "acme/tables"
    assert ask(house, "/api/models/acme/tables.prod/refs").json() == ask(house, "/api/models/acme/tables/refs").json()
    assert commit_of(house, "main", "Acme/Tables.PROD") == commit_of(house, "prod"), "as `create_repo` lowers names"
    for unknown in (
        "tables.canary",
        "tables.9.9.9",
        "tables.",
        "tables.lite.prod",
        f"tables.{commit_of(house, 'prod')}",
    ):
        assert ask(house, f"/api/models/acme/{unknown}").headers["X-Error-Code"] == "RepoNotFound", unknown


def test_a_new_name_that_would_stand_for_something_else_is_refused(house: House) -> None:
    for name in ("tables.prod", "tables.3.0.0", "tables.v1.0.0", "tables.lite.1.0.0"):
        with pytest.raises(Conflict, match="for acme/tables"):
            _publish(house, name, "1.0.0", {"weights.safetensors": b"x"})
    for name in ("tables.staging", "tables2.5-sql"):
        _publish(house, name, "1.0.0", {"weights.safetensors": b"x"})
    shadowed = PromotionRequest(_named("tables"), parse_version("1.0.0"), "lite")
    with (
        pytest.raises(Conflict, match=r"confuse it with the repository acme/tables\.lite"),
        house.resources.write() as session,
    ):
        promotions.request(session, HOST, shadowed)
    _publish(house, "later.v2.0.0", "1.0.0", {"weights.safetensors": b"x"})
    _publish(house, "later", "1.0.0", {"weights.safetensors": b"x"})
    with pytest.raises(Conflict, match=r"confuse it with the repository acme/later\.v2\.0\.0"):
        _publish(house, "later", "2.0.0", {"weights.safetensors": b"x"})


def test_a_head_pins_the_commit_and_a_get_has_the_bytes(house: House) -> None:
    sha256, commit = hashlib.sha256(b"one").hexdigest(), commit_of(house, "prod")
    head = ask(house, "/acme/tables/resolve/prod/weights.safetensors", "HEAD")
    assert (head.status_code, head.headers["Content-Length"], head.headers["X-Linked-Size"]) == (200, "3", "3")
    assert head.headers["ETag"] == head.headers["X-Linked-ETag"] == f'"{sha256}"'
    assert (head.headers["X-Repo-Commit"], head.headers["Accept-Ranges"]) == (commit, "bytes")
    pinned = f"/acme/tables/resolve/{commit}/weights.safetensors"
    assert head.headers["Location"] == f"http://registry{pinned}"
    assert "no-cache" in head.headers["Cache-Control"]
    fixed = ask(house, pinned, "HEAD")
    assert "Location" not in fixed.headers
    assert "immutable" in fixed.headers["Cache-Control"]
    assert _bytes(house, pinned) == b"one"
    assert _bytes(house, pinned, Range="bytes=1-") == b"ne"
    assert ask(house, pinned, If_None_Match=f'"{sha256}"').status_code == 304
    assert _bytes(house, pinned, Range="bytes=1-", If_Range=f'"{sha256}"') == b"ne"
    other = ask(house, pinned, Range="bytes=1-", If_Range='"of the release before"')
    assert other.status_code == 307 or (other.status_code, other.content) == (200, b"one")
    alias = ask(house, "/acme/tables.prod/resolve/main/weights.safetensors", "HEAD")
    assert alias.headers["Location"] == head.headers["Location"]


def _bytes(house: House, path: str, **headers: str) -> bytes:
    """Follows the redirect to the store, which gets no token."""
    answer = ask(house, path, **headers)
    assert answer.headers["X-Repo-Commit"] in path
    if answer.status_code == 307:
        return httpx2.get(answer.headers["Location"], headers=headers).raise_for_status().content
    assert answer.status_code == (206 if headers else 200)
    assert "content-encoding" not in answer.headers
    return answer.content


def test_a_path_is_decoded_once(house: House) -> None:
    head = ask(house, f"/acme/tables/resolve/prod/{ODD_QUOTED}", "HEAD")
    assert head.headers["Location"].endswith(f"/{ODD_QUOTED}")
    assert _bytes(house, httpx2.URL(head.headers["Location"]).raw_path.decode()) == b"odd"


def test_a_tree_has_directories_and_comes_in_pages(house: House) -> None:
    root = ask(house, "/api/models/acme/tables/tree/1.1.0?recursive=False&expand=False").json()
    assert [(entry["type"], entry["path"]) for entry in root] == [
        ("file", "adapter_config.json"), ("directory", "sub dir"), ("file", "weights.safetensors"),
    ]  # fmt: skip
    sha256 = hashlib.sha256(b"two").hexdigest()
    assert (root[2]["size"], root[2]["lfs"]["oid"], root[2]["lfs"]["size"]) == (3, sha256, 3)
    below = ask(house, "/api/models/acme/tables/tree/1.1.0/sub%20dir?recursive=True").json()
    assert [entry["path"] for entry in below] == ["sub dir/deep", "sub dir/deep/x.txt", ODD]
    everything = ask(house, "/api/models/acme/tables/tree/1.1.0?recursive=True").json()
    path, listed = "/api/models/acme/tables/tree/1.1.0?recursive=True&limit=2", []
    while path:
        answer = ask(house, path)
        listed += answer.json()
        path = answer.links["next"]["url"] if answer.links else ""
        assert path == "" or path.startswith(
            "http://registry/api/models/acme/tables/tree/1.1.0?recursive=True&limit=2&"
        )
    assert listed == everything
    assert len(listed) == 6


def test_expanded_entries_name_the_release_that_brought_them(house: House) -> None:
    entries = ask(house, "/api/models/acme/tables/tree/1.1.0?expand=True").json()
    assert {entry["path"]: entry["lastCommit"]["title"] for entry in entries} == {
        "adapter_config.json": "1.0.0", "sub dir": "1.0.0", "weights.safetensors": "1.1.0",
    }  # fmt: skip
    assert entries[2]["lastCommit"]["id"] == commit_of(house, "1.1.0")


def test_paths_are_asked_for_in_a_form_and_absent_ones_left_out(house: House) -> None:
    form = {"paths": ["sub dir", "weights.safetensors", "absent"], "expand": "False"}
    answer = house.ask("reader", "POST", "/api/models/acme/tables/paths-info/prod", data=form)
    assert [entry["path"] for entry in answer.json()] == ["sub dir", "weights.safetensors"]
    assert house.ask("reader", "POST", "/api/models/acme/tables/paths-info/prod", data={"paths": ["x"]}).json() == []


def test_references_and_commits_are_channels_and_releases(house: House) -> None:
    refs = ask(house, "/api/models/acme/tables/refs?include_prs=1").json()
    assert {branch["name"]: branch["targetCommit"] for branch in refs["branches"]} == {
        "main": commit_of(house, "1.1.0"), "prod": commit_of(house, "1.0.0"),
    }  # fmt: skip
    assert [tag["name"] for tag in refs["tags"]] == ["2.0.0-rc.1", "1.2.0", "1.1.0", "1.0.0"]
    assert (refs["tags"][3]["ref"], refs["converts"], refs["pullRequests"]) == ("refs/tags/1.0.0", [], [])
    commits = ask(house, "/api/models/acme/tables/commits/main?expand%5B%5D=formatted").json()
    assert [(commit["title"], commit["message"]) for commit in commits] == [
        ("1.1.0", "Notes of 1.1.0"), ("1.0.0", "Notes of 1.0.0"),
    ]  # fmt: skip
    assert (commits[0]["authors"][0]["user"], commits[0]["date"]) == ("host", "2026-01-01T00:00:00.000Z")
    first = ask(house, "/api/models/acme/tables/commits/main?limit=1")
    assert [first.json(), ask(house, first.links["next"]["url"]).json()] == [commits[:1], commits[1:]]


def test_a_gate_refuses_a_branch_with_its_numbers(house: House) -> None:
    gates = {"channel": "guarded", "rules": ["exact.nll <= 0.001"]}
    house.ask("admin", "PUT", "/v1/adapters/acme/sql/gates", json=gates).raise_for_status()
    answer = house.ask("releaser", "POST", "/api/models/acme/sql/branch/guarded", json={"startingPoint": "1.0.0"})
    assert (answer.status_code, "exact.nll <= 0.001: " in answer.headers["X-Error-Message"]) == (422, True)


def test_an_info_has_what_was_asked_for(house: House) -> None:
    plain = ask(house, "/api/models/acme/tables?securityStatus=True").json()
    assert (plain["id"], plain["author"], plain["private"], plain["library_name"]) == (
        "acme/tables",
        "acme",
        True,
        "peft",
    )
    assert "base_model:adapter:tiny" in plain["tags"]
    assert [set(sibling) for sibling in plain["siblings"]] == [{"rfilename"}] * 4
    sized = ask(house, "/api/models/acme/tables?blobs=True").json()["siblings"]
    assert {sibling["rfilename"]: sibling["lfs"]["size"] for sibling in sized}["weights.safetensors"] == 3
    assert set(ask(house, "/api/models/acme/tables?expand=sha&expand=tags&expand=unknown").json()) == {
        "id",
        "sha",
        "tags",
    }


def test_models_are_listed_by_author_words_and_tags(house: House) -> None:
    def listed(query: str) -> list[str]:
        return [model["id"] for model in ask(house, f"/api/models?{query}").raise_for_status().json()]

    everything = listed("")
    assert everything == sorted(everything)
    assert {"acme/tables", "acme/sql", "open/sql"} < set(everything)
    assert [name for name in everything if name.startswith("other/")] == []
    assert listed("author=open") == ["open/assistants", "open/merged", "open/sql"]
    assert listed("search=TABLES") == [name for name in everything if "tables" in name]
    assert listed("search=tables&search=lite") == ["acme/tables.lite"]
    assert listed("author=open&filter=base_model:adapter:tiny") == ["open/sql"]
    assert listed("author=open&filter=transformers&filter=base_model:tiny") == ["open/merged"]
    for nothing in ("author=ghost", "search=100%25", "filter=base_model:ghost", "filter=gguf", "filter=license:mit"):
        assert listed(nothing) == [], nothing
    path, pages = "/api/models?limit=2", []
    while path:
        answer = ask(house, path)
        pages += [model["id"] for model in answer.json()]
        path = answer.links["next"]["url"] if answer.links else ""
    assert pages == everything


@pytest.mark.parametrize(
    ("caller", "path", "status", "code", "words"),
    [
        ("reader", "/api/models/acme/ghost", 404, "RepoNotFound", "repository acme/ghost does not exist"),
        ("reader", "/gpt2/resolve/main/config.json", 404, "RepoNotFound", "repository gpt2 does not exist"),
        ("nobody", "/api/models/acme/tables", 404, "RepoNotFound", "your token"),
        ("stranger", "/acme/tables/resolve/main/weights.safetensors", 404, "RepoNotFound", "acme does not exist"),
        ("reader", "/api/models/acme/tables/revision/refs%2Fpr%2F1", 404, "RevisionNotFound", "It has prod, 2.0"),
        ("reader", f"/api/models/acme/tables/tree/{'0' * 40}", 404, "RevisionNotFound", "no version, channel"),
        ("reader", "/acme/tables/resolve/prod/absent.txt", 404, "EntryNotFound", "has no file 'absent.txt'"),
        ("reader", "/acme/tables/resolve/prod/%00%E2%82%AC", 404, "EntryNotFound", "has no file"),
        ("reader", "/acme/tables/resolve/prod/%0D%0AX-Evil:%20x", 404, None, "Not Found"),
        ("reader", "/api/models/acme/tables/tree/prod/absent", 404, "EntryNotFound", "has no file 'absent'"),
        ("revoked", "/api/models/open/sql", 401, None, "Invalid credentials in Authorization header"),
        ("nobody", "/api/whoami-v2", 401, None, "needs a token"),
        ("reader", "/api/models/acme/tables/auth-check/write", 403, None, "does not have the role publisher"),
        ("reader", "/api/datasets/acme/tables", 404, None, "does not support GET /api/datasets/acme/tables"),
        ("reader", "/api/models?author=%00", 422, None, "NUL"),
        ("reader", "/api/models?cursor=%25", 400, None, "Invalid cursor"),
        ("reader", "/api/models?limit=0", 422, None, "limit"),
    ],
)  # fmt: skip
def test_an_error_has_the_exception_and_the_words_of_the_client(
    house: House, caller: str, path: str, status: int, code: str | None, words: str
) -> None:
    answer = house.ask(caller, "GET", path)
    assert (answer.status_code, answer.headers.get("X-Error-Code")) == (status, code), answer.text
    message = answer.headers["X-Error-Message"]
    assert words in message
    assert message.isprintable()
    assert "X-Evil" not in answer.headers
    assert json.loads(answer.text)["status"] == status
    if code == "EntryNotFound":
        assert answer.headers["X-Repo-Commit"] == commit_of(house, "prod")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/api/repos/create"),
        ("POST", "/api/models/acme/tables/preupload/main"),
        ("POST", "/acme/tables.git/info/lfs/objects/batch"),
        ("POST", "/api/models/acme/tables/tag/main"),
        ("DELETE", "/api/repos/delete"),
    ],
)
def test_a_body_is_read_after_its_caller_is_known_and_parsed_only_if_it_has_few_values(
    house: House, method: str, path: str
) -> None:
    lists = b'{"name": "x", "values": [' + b",".join([b"[]"] * 2_000_000) + b"]}"
    headers = {"Content-Type": "application/json"}
    stranger = house.ask("nobody", method, path, content=b"{" + b" " * 100_000, headers=headers)
    assert (stranger.status_code, stranger.json()["code"]) in {(404, "namespace_unknown"), (413, "body_too_large")}
    answer = house.ask("publisher", method, path, content=lists, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large"), answer.text


def test_what_anyone_may_ask_is_bounded(house: House) -> None:
    for name in ("search", "filter"):
        query = "&".join([f"{name}=license:a"] * 1_500)
        answer = house.ask("nobody", "GET", f"/api/models?{query}")
        assert (answer.status_code, name in answer.headers["X-Error-Message"]) == (422, True), answer.text
    form = b"&".join([b"paths=a"] * 200_000)
    answer = house.ask("nobody", "POST", "/api/models/open/sql/paths-info/main", content=form)
    assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large"), answer.text


def test_a_yanked_release_comes_with_a_warning(house: House) -> None:
    warning = ask(house, "/acme/tables/resolve/1.2.0/weights.safetensors", "HEAD").headers["X-HF-Warning"]
    assert warning == "release; acme/tables:1.2.0 is yanked: wrong data."
    assert "X-HF-Warning" not in ask(house, "/api/models/acme/tables").headers


def test_a_repository_whose_releases_are_all_yanked_has_no_main(house: House) -> None:
    _publish(house, "gone", "1.0.0", {"weights.safetensors": b"gone"})
    with house.resources.write() as session:
        withdrawals.yank(session, HOST, releases.find(session, _named("gone"), parse_version("1.0.0")), "lost")
    answer = ask(house, "/api/models/acme/gone")
    assert (answer.status_code, answer.headers["X-Error-Code"]) == (404, "RevisionNotFound")
    assert ask(house, "/api/models/acme/gone/refs").json()["branches"] == []
    assert commit_of(house, "1.0.0", "acme/gone")
    assert [model.get("sha") for model in ask(house, "/api/models?search=gone").json()] == [None]


def test_a_user_is_shown_with_the_namespaces_and_what_the_token_may_do(house: House) -> None:
    shown = {caller: house.ask(caller, "GET", "/api/whoami-v2").json() for caller in ("reader", "releaser")}
    assert [org["name"] for org in shown["reader"]["orgs"]] == ["acme", "open"]
    assert {name: one["auth"]["accessToken"]["role"] for name, one in shown.items()} == {
        "reader": "read", "releaser": "write",
    }  # fmt: skip
