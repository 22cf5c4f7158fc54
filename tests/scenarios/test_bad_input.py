"""Users' mistakes: each results in one clear error, the exit code of its family and a next step, and leaves nothing."""

import hashlib
import json
import shutil
from pathlib import Path

import httpx2
import pytest
import yaml

from registry.errors import Usage
from tests import services
from tests.scenarios.conftest import stock
from tests.scenarios.traces import api_of, traces
from tests.scenarios.world import Cli, Ran, World, server
from tests.small_disk import small_disk


def refused(ran: Ran, code: int, *fragments: str) -> None:
    """Refused with this exit code, in words that name the mistake, on stderr alone; a change names its registry."""
    assert ran.code == code, f"{ran.code}: {ran.out}{ran.err}"
    assert ran.out == ""
    said = [line for line in ran.err.splitlines() if not line.startswith("registry: ")]
    assert said[0].startswith(("error: ", "Usage: ")), ran.err
    assert "Traceback" not in ran.err
    for fragment in fragments:
        assert fragment in ran.err


@pytest.fixture(scope="module", params=services.ONE_PAIRING)
def with_release(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, world: World) -> Cli:
    """One registry of each pairing for all cases here: none of them may change it."""
    home = tmp_path_factory.mktemp("bad-input") / "home"
    cli = stock(Cli({"ADAPTORY_HOME": str(home), **services.pairing(request.param)}), world)
    cli.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny", "--channel", "prod")
    return cli


@pytest.mark.parametrize(
    ("arguments", "code", "fragments"),
    [
        (("show", "acme/unknown"), 3, ["acme/unknown", "adaptory list"]),
        (("show", "acme/sql:9.9.9"), 3, ["9.9.9", "adaptory log acme/sql"]),
        (("show", "acme/sql:^3.0"), 3, ["^3.0", "adaptory log acme/sql"]),
        (("show", "acme/sql@canary"), 3, ["acme/sql@canary"]),
        (("show", "acme/sql#0123456789"), 3, ["0123456789"]),
        (("show", "acme/sql:1.x.y.z"), 2, ["1.x.y.z"]),
        (("show", "acme/sql:01.0.0"), 2, ["01.0.0", "MAJOR.MINOR.PATCH"]),
        (("show", "acme"), 2, ["namespace/name"]),
        (("show", "Acme/SQL"), 2, ["'Acme'"]),
        (("inspect", "./out"), 2, ["'./out'", "namespace/name", "directory"]),
        (("verify", "/nowhere", "--rebuild"), 2, ["'/nowhere'", "directory"]),
        (("show", "acme/sql#xyz"), 2, ["'xyz'"]),
        (("base", "show", "Nobody/Knows-This"), 3, ["Nobody/Knows-This", "adaptory base"]),
        (("search", "--base", "unknown"), 3, ["'unknown'", "adaptory base"]),
        (("search", "--score", "sql-exact.accuracy>0.5"), 2, ["sql-exact.accuracy>0.5"]),
        (("search", "--score", "sql-exact.accuracy>=nan"), 2, ["nan"]),
        (("promote", "acme/sql:1.0", "--to", "Prod!"), 2, ["Prod!"]),
        (("rollback", "acme/sql"), 2, ["does not name a channel"]),
        (("rollback", "acme/nope@prod"), 3, ["acme/nope does not exist", "adaptory list"]),
        (("log", "nobody/nope"), 3, ["nobody/nope does not exist", "adaptory whoami"]),
        (
            ("search", "--loads-in", "foo"),
            2,
            ["Unknown profile 'foo'", "next: Use one of vllm:<max_lora_rank>, sglang"],
        ),
        (("search", "--loads-in", "vllm:7"), 2, ["'vllm:7'", "must be one of 1, 8, 16", "next: Use one of vllm"]),
        (("inspect", "acme/sql", "--loads-in", "foo"), 2, ["Unknown profile 'foo'", "next: Use one of vllm"]),
        (("search", "--include", "related"), 2, ["without base", "next: Add base (--base)"]),
        (("search", "--include", "refused", "--base", "tiny"), 2, ["without loads_in", "(--loads-in)"]),
        (("search", "--max-rank", "0"), 6, ["--max-rank: ", "next: Correct --max-rank;"]),
        (("token", "create", "--name=" + "x" * 101), 6, ["name", "next: Correct --name;"]),
        (("namespace", "grant", "acme", "a/b", "reader"), 6, ["user", "next: Correct user;"]),
        (("namespace", "set", "acme", "--require-signature"), 1, ["acme", "--signing-key"]),
        (("token", "create", "--expires-in-days", "nan"), 2, ["nan days", "--expires-in-days"]),
        (("token", "create", "--expires-in-days", "inf"), 2, ["inf days", "--expires-in-days"]),
        (("token", "create", "--expires-in-days", "-1"), 6, ["greater than 0", "next: Correct --expires-in-days;"]),
        (("base", "unalias", "Nobody/Knows-This"), 3, ["Nobody/Knows-This", "adaptory base list"]),
        (("base", "unalias", "tiny"), 3, ["a base's own name stays"]),
        (
            ("token", "create", "--scope", "acme=king"),
            6,
            ["--scope: 'king' is unknown", "next: Use 'reader', 'agent', 'publisher'"],
        ),
        (("namespace", "grant", "acme", "bo", "king"), 6, ["role", "next: Use 'reader', 'agent', 'publisher'"]),
        (("audit", "--since", "yesterday"), 6, ["since", "next: Write a day", "2026-01-31T12:00:00Z"]),
        (("rollback", "acme/sql@prod"), 1, ["acme/sql@prod", "adaptory history"]),
        (("rollback", "acme/sql@prod", "--to", "1.9.0"), 1, ["never served 1.9.0"]),
        (("gate", "acme/sql@prod", "--rule", "be nice"), 2, ["be nice", "SUITE.METRIC"]),
        (("gate", "acme/sql@prod", "--rule", "sql-exact.nll within -1 of served"), 2, ["within -1"]),
        (("yank", "acme/sql:1.0.0", "--reason", " "), 2, ["reason"]),
        (("eval", "acme/sql", "--suite", "unknown-suite"), 3, ["unknown-suite", "adaptory suite add"]),
        (("eval", "acme/sql", "--suite", "suites/sql.yaml"), 2, ["suites/sql.yaml", "adaptory suite add FILE"]),
        (("eval", "acme/nothing", "--suite", "sql-exact"), 3, ["acme/nothing"]),
        (("conflicts", "acme/sql", "acme/sql", "--weights", "1,two"), 2, ["1,two"]),
        (("conflicts", "acme/sql", "acme/sql", "--guard", "sql-exact"), 2, ["--probe"]),
        (("jobs", "77"), 3, ["77"]),
        (("cancel", "77"), 3, ["77"]),
    ],
)
def test_a_name_or_a_rule_that_makes_no_sense(
    with_release: Cli, arguments: tuple[str, ...], code: int, fragments: list[str]
) -> None:
    before = traces(with_release)
    refused(with_release(*arguments), code, *fragments)
    assert traces(with_release) == before


def test_a_push_without_a_version_or_with_two_says_how_to_write_it(with_release: Cli, world: World) -> None:
    adapter = world.adapters["sql"]
    for target in ("acme/sql", "acme/sql@prod", "acme/sql:^1.0", "acme/sql#0123456"):
        refused(with_release("push", adapter, target, "--base", "tiny"), 2, "REPO:VERSION")
    both = with_release("push", adapter, "acme/sql:1.0.1", "--bump", "minor", "--base", "tiny")
    refused(both, 2, "REPO:VERSION")
    for malformed in ("1.2", "1.2.3+build", "vv1.2.3", "1.2.3-", "1.2.3.4"):
        assert with_release("push", adapter, f"acme/sql:{malformed}", "--base", "tiny").code == 2
    assert "None" not in with_release("push", adapter, "acme/sql", "--base", "tiny").err
    assert traces(with_release).releases == ("acme/sql:1.0.0",)


def test_a_file_or_a_directory_that_is_not_there_is_bad_input(with_release: Cli, world: World, tmp_path: Path) -> None:
    absent, adapter = tmp_path / "absent.pem", world.adapters["sql"]
    push = ("push", adapter, "acme/sql:1.0.1", "--base", "tiny")
    for command in (
        (*push, "--sign", absent),
        (*push, "--provenance", absent),
        ("namespace", "set", "acme", "--signing-key", absent),
        ("pull", "acme/sql", "-o", tmp_path / "out", "--verify", absent),
        ("conflicts", "acme/sql", "acme/sql", "--policy", absent),
        ("compose", absent),
    ):
        ran = with_release(*command)
        refused(ran, 6, f"{absent}", "No such file", "next: ")
        assert "Errno" not in ran.err
    for command in (("push", absent, "acme/x:1.0.0", "--base", "tiny"), ("push", absent, "acme/x:1.0.0")):
        refused(with_release(*command), 6, f"{absent} is not a directory", "next: Name the")
    (tmp_path / "latin.yaml").write_bytes(b"trainer: M\xfcller")
    refused(
        with_release(*push, "--provenance", tmp_path / "latin.yaml"), 6, "latin.yaml", "is not UTF-8, from byte 10 on"
    )
    assert traces(with_release).releases == ("acme/sql:1.0.0",)


def test_a_key_that_cannot_sign_is_named(with_release: Cli, world: World, tmp_path: Path) -> None:
    (tmp_path / "key.pem").write_text("not a key")
    push = ("push", world.adapters["sql"], "acme/sql:1.0.1", "--base", "tiny", "--sign", tmp_path / "key.pem")
    refused(with_release(*push), 6, "key.pem cannot sign: it contains no private key", "openssl")


def test_errors_are_one_json_document_when_asked_for(with_release: Cli) -> None:
    ran = with_release("show", "acme/sql:^3.0", "--json")
    assert ran.code == 3
    error = json.loads(ran.out)["error"]
    assert error["code"] == "no_match"
    assert error["subject"] == "acme/sql:^3.0"
    assert error["next"]


RECIPE = {"inputs": ["acme/sql:1.0.0"], "method": "stack", "adapter": "acme/both:1.0.0"}


@pytest.mark.parametrize(
    ("recipe", "code", "fragments"),
    [
        (RECIPE | {"wieght": 1}, 6, ["wieght", "recipe.yaml"]),
        (RECIPE | {"inputs": [{"adapter": "acme/sql", "weights": 2}]}, 6, ["inputs[0]", "weights"]),
        (RECIPE | {"inputs": [{"adapter": "acme/sql", "weight": "much"}]}, 6, ["inputs[0]", "much"]),
        (RECIPE | {"inputs": [{"adapter": "acme/sql", "weight": float("nan")}]}, 6, ["inputs[0]", "nan"]),
        (RECIPE | {"inputs": []}, 6, ["inputs"]),
        (RECIPE | {"method": "alchemy"}, 6, ["alchemy"]),
        (RECIPE | {"inputs": ["acme/unknown:1.0.0"]}, 3, ["acme/unknown"]),
        (RECIPE | {"inputs": ["acme/sql:^7"]}, 3, ["^7"]),
        (RECIPE | {"base": "unknown"}, 3, ["'unknown'"]),
        (RECIPE | {"adapter": "acme/both"}, 2, ["acme/both", "NAMESPACE/NAME:VERSION"]),
        ({"inputs": ["acme/sql:1.0.0"], "method": "stack"}, 2, ["adapter", "--plan"]),
        (RECIPE | {"evaluate": ["unknown-suite"]}, 3, ["unknown-suite"]),
        (RECIPE | {"gates": ["be nice"]}, 2, ["be nice"]),
        ([1, 2], 6, ["recipe.yaml"]),
    ],
)
def test_a_recipe_that_cannot_work(
    with_release: Cli, tmp_path: Path, recipe: object, code: int, fragments: list[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    before, jobs = traces(with_release), with_release.json("jobs")
    refused(with_release("compose", path), code, *fragments)
    assert traces(with_release) == before
    assert with_release.json("jobs") == jobs, "nothing was even begun"


def test_a_setting_that_the_method_does_not_know_is_refused_before_any_work(with_release: Cli, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE | {"settings": {"densty": 0.5}}))
    before = traces(with_release)
    ran = with_release("compose", path, "--plan")
    assert ran.code == 6
    assert "densty" in ran.err
    assert "tied" in ran.err, "it says what there is"
    assert traces(with_release) == before


def test_a_recipe_that_is_not_there_or_not_yaml(with_release: Cli, tmp_path: Path) -> None:
    refused(with_release("compose", tmp_path / "absent.yaml"), 6, "absent.yaml")
    (tmp_path / "broken.yaml").write_text("inputs: [a\nmethod: }")
    refused(with_release("compose", tmp_path / "broken.yaml"), 6, "broken.yaml")


def test_weights_that_do_not_parse(with_release: Cli, world: World, tmp_path: Path) -> None:
    for number in ("much", "nan", "inf", "", "1e13", "1_0"):
        for command in (("merge", "--base", world.base), ("combine",)):
            adapter = f"{world.adapters['sql']}={number}"
            refused(with_release(*command, "--adapter", adapter, "-o", tmp_path / "out"), 2, "DIR=0.7")
            refused(with_release(*command, "--adapter", "", "-o", tmp_path / "out"), 2, "does not name a directory")
    refused(
        with_release("merge", "--base", world.base, "--adapter", "/nowhere=1", "-o", tmp_path / "out"), 6, "/nowhere"
    )
    assert not (tmp_path / "out").exists()


def test_an_output_that_exists_is_never_touched(with_release: Cli, world: World, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    adapter = world.adapters["sql"]
    for command in (
        ("pull", "acme/sql", "-o", out),
        ("merge", "--base", world.base, "--adapter", adapter, "-o", out),
        ("combine", "--adapter", adapter, "-o", out),
    ):
        refused(with_release(*command), 4, str(out), "exists")
    assert [(path.name, path.read_text()) for path in out.iterdir()] == [("thesis.txt", "years of work")]
    assert {path.name for path in tmp_path.iterdir()} == {"mine"}


def test_a_full_disk_ends_a_merge_and_leaves_nothing(on_disk: Cli, world: World, tmp_path: Path) -> None:
    """Once detected before it begins, once when side files fill the disk halfway."""
    base = shutil.copytree(world.base, tmp_path / "base")
    with small_disk(tmp_path / "small", "1m") as disk:
        merge = ("merge", "--base", base, "--adapter", world.adapters["sql"], "-o", disk / "merged")
        refused(on_disk(*merge), 7, "disk is full", "Free some space")
        assert list(disk.iterdir()) == []
    (base / "vocabulary.txt").write_bytes(b"x" * (20 << 20))
    with small_disk(tmp_path / "medium", "12m") as disk:
        merge = ("merge", "--base", base, "--adapter", world.adapters["sql"], "-o", disk / "merged")
        refused(on_disk(*merge), 7, "disk is full", "Free some space")
        assert list(disk.iterdir()) == []


@pytest.mark.long
def test_a_full_disk_ends_a_push_and_leaves_nothing(on_disk: Cli, world: World, tmp_path: Path) -> None:
    adapter = shutil.copytree(world.adapters["sql"], tmp_path / "adapter")
    (adapter / "tokenizer.json").write_bytes(b"x" * (8 << 20))
    with small_disk(tmp_path / "small", "6m") as disk:
        cli = Cli(on_disk.environment | {"ADAPTORY_HOME": str(disk)})
        cli.ok("base", "add", world.base, "--name", "tiny")
        refused(cli("push", adapter, "acme/sql:1.0.0", "--base", "tiny"), 7, "Free some space")
        left = traces(cli)
        assert (left.work, left.releases) == (frozenset(), ())
        (adapter / "tokenizer.json").unlink()
        cli.ok("push", adapter, "acme/sql:1.0.0", "--base", "tiny")


def test_a_full_disk_ends_a_pull_and_leaves_no_directory(with_release: Cli, tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", "8k") as disk:
        refused(with_release("pull", "acme/sql", "-o", disk / "out"), 7, "Free some space")
        assert not (disk / "out").exists()


def test_a_bad_cursor_is_a_usage_error(with_release: Cli) -> None:
    with api_of(with_release) as api:
        for path in (
            "/v1/releases",
            "/v1/bases",
            "/v1/adapters",
            "/v1/audit",
            "/v1/jobs",
            "/v1/adapters/acme/sql/channels/prod/history",
        ):
            with pytest.raises(Usage) as raised:
                api.get(path, cursor="!!!")
            assert (raised.value.code, raised.value.exit_code) == ("bad_cursor", 2)


def test_a_registry_that_does_not_answer_is_unavailable(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{services.free_port()}"
    cli = Cli({"ADAPTORY_HOME": str(tmp_path / "home"), "ADAPTORY_URL": url})
    for command in (("list",), ("show", "acme/sql"), ("pull", "acme/sql", "-o", tmp_path / "out")):
        refused(cli(*command), 7, url, "ADAPTORY_URL")
    assert not (tmp_path / "out").exists()


def test_a_home_that_cannot_be_used_is_unavailable(embedded: Cli, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    refused(embedded("list"), 7, "ADAPTORY_HOME")


def test_a_file_above_the_limit_is_refused_before_it_is_sent(stocked_embedded: Cli, world: World) -> None:
    small = Cli(stocked_embedded.environment | {"ADAPTORY_MAX_FILE_BYTES": "1000"})
    refused(
        small("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny"), 6, "1,000", "ADAPTORY_MAX_FILE_BYTES"
    )
    assert traces(small).blobs == frozenset()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "example.org"])  # noqa: S104
def test_serving_beyond_loopback_is_not_allowed(tmp_path: Path, host: str) -> None:
    refused(Cli({"ADAPTORY_HOME": str(tmp_path)})("serve", "--host", host), 5, host, "127.0.0.1")


FILE = {"path": "a.json", "size_bytes": 1, "sha256": "0" * 64}
SCORE = {"suite_digest": "0" * 64, "metric": "nll", "value": 1.0, "n": 1, "higher_is_better": False}


def refused_as(answer: httpx2.Response, status: int) -> None:
    """One status in the answer and in its body, and what to do next."""
    answered = answer.json()
    assert answer.headers["content-type"] == "application/problem+json", answer.url
    assert {"type", "title", "status", "detail", "code", "subject", "next"} <= set(answered)
    assert (answer.status_code, answered["status"]) == (status, status), answered
    assert answered["next"], answered


def test_a_server_refuses_pages_of_other_sites_and_names_of_others(tmp_path: Path) -> None:
    """By headers alone, independent of its database and store."""
    with server(tmp_path / "home") as (url, _):
        # A name of somebody else that leads to loopback: a page in a browser could use it.
        for host in ("evil.example", "localhost.evil.example:8000", "[", "[::1", "127.0.0.1@evil.example:1"):
            refused_as(httpx2.get(f"{url}/v1/bases", headers={"Host": host}), 421)
        for origin in ("http://evil.example", "http://[", "null", "http://localhost.evil.example"):
            refused_as(httpx2.get(f"{url}/v1/bases", headers={"Origin": origin}), 403)
        for own in ("localhost", "127.0.0.1:80", "[::1]:8000"):
            assert httpx2.get(f"{url}/v1/bases", headers={"Host": own, "Origin": f"http://{own}"}).status_code == 200


def test_a_disk_that_cannot_be_written_is_named_by_the_server(tmp_path: Path) -> None:
    """Of a directory: bytes sent to S3 do not pass the server's disk."""
    content = b"some bytes"
    sha256 = hashlib.sha256(content).hexdigest()
    with server(tmp_path / "home") as (url, _):
        file = {"path": "notes.txt", "size_bytes": len(content), "sha256": sha256}
        plan = httpx2.post(f"{url}/v1/uploads", json={"namespace": "acme", "files": [file]}).json()
        path = f"/v1/blobs/{sha256}?upload={plan['files'][0]['upload']}"
        (tmp_path / "home" / "work").rename(tmp_path / "elsewhere")
        answer = httpx2.put(url + path, content=content)
        refused_as(answer, 503)
        assert answer.json()["code"] == "disk_error"
        (tmp_path / "elsewhere").rename(tmp_path / "home" / "work")
        assert httpx2.put(url + path, content=content).status_code == 201


def test_a_server_refuses_odd_requests_and_stays_well(pairing: dict[str, str], tmp_path: Path) -> None:
    with server(tmp_path / "home", ADAPTORY_MAX_DOCUMENT_BYTES="2000", **pairing) as (url, process):
        long = json.dumps({"recipe": {"notes": "x" * 3000}})
        answered = httpx2.post(f"{url}/v1/compositions", content=long, headers={"Content-Type": "application/json"})
        assert (answered.status_code, answered.json()["code"]) == (413, "body_too_large")
        chunked = httpx2.post(f"{url}/v1/compositions", content=iter([long.encode()]))
        assert chunked.status_code == 413, "without a Content-Length it is refused as it arrives"

        for method, path, body, status in (
            ("GET", "/v1/nothing", None, 404),
            ("PATCH", "/v1/bases", None, 405),
            ("POST", "/v1/uploads", "not json", 422),
            ("POST", "/v1/uploads", '{"files": [], "colour": "red"}', 422),
            ("GET", "/v1/releases?limit=0", None, 422),
            ("GET", "/v1/releases?limit=many", None, 422),
            ("GET", "/v1/releases?cursor=!!", None, 400),
            ("GET", "/v1/resolve?ref=", None, 400),
            ("GET", "/v1/blobs/abc", None, 400),
            ("GET", f"/v1/blobs/{'0' * 64}", None, 404),
            ("PUT", f"/v1/blobs/{'0' * 64}", "x", 422),
            ("GET", "/v1/jobs/1", None, 404),
            ("GET", "/v1/compositions/1", None, 404),
            ("POST", "/v1/suites", '{"name": "x"}', 422),
            ("GET", f"/v1/jobs/{2**63}", None, 422),
            ("POST", f"/v1/jobs/{'9' * 5000}/cancel", None, 422),
            ("GET", f"/v1/compositions/{10**20}", None, 422),
            ("GET", f"/v1/releases?max_rank={10**20}", None, 422),
            ("POST", "/v1/uploads", json.dumps({"files": [FILE | {"size_bytes": 2**63}]}), 422),
            ("POST", "/v1/bases/none/scores", json.dumps({"scores": [SCORE | {"n": 2**31}]}), 422),
            ("POST", "/v1/bases/none/scores", json.dumps({"scores": [SCORE | {"value": 10**400}]}), 422),
            ("POST", "/v1/bases/none/scores", json.dumps({"scores": [SCORE]}), 404),
        ):
            answer = httpx2.request(method, url + path, content=body, headers={"Content-Type": "application/json"})
            assert answer.status_code == status, f"{method} {path}: {answer.status_code} {answer.text}"
            refused_as(answer, status)
        form = httpx2.post(f"{url}/v1/uploads", data={"files": ""})
        assert "Content-Type: application/json" in form.json()["next"]
        assert "GET" in httpx2.put(f"{url}/v1/jobs").headers["Allow"]
        assert httpx2.get(f"{url}/readyz").status_code == 200
        assert process.is_alive()
