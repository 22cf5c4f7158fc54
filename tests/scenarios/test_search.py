"""Searches as people make them: for a base and its derivatives, for a server, for words, one page at a time."""

import shutil
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest
from safetensors.torch import load_file, save_file

from registry.wire.catalog import ReleaseOut
from registry.wire.search import FoundOut, FoundPage, ResolvedOut
from tests.scenarios.conftest import serving, stock
from tests.scenarios.traces import api_of
from tests.scenarios.world import Cli, World


@pytest.fixture
def shelf(stocked: Cli, world: World) -> Cli:
    for name, target in (
        ("sql", "acme/sql:1.0.0"),
        ("terraform", "acme/terraform:1.0.0"),
        ("support", "beta/help:1.0.0"),
    ):
        stocked.ok("push", world.adapters[name], target, "--base", "tiny", "--notes", f"Trained on {name} tickets")
    return stocked


def search(cli: Cli, *asked: object) -> list[str]:
    return [f"{item['repository']}:{item['version']}" for item in cli.json("search", *asked)["items"]]


def test_a_platform_engineer_finds_what_the_server_loads_and_why_not_the_rest(shelf: Cli) -> None:
    asked = ("--base", "tiny", "--max-rank", "4", "--targets-within", "q_proj,v_proj,o_proj")
    assert search(shelf, *asked) == ["beta/help:1.0.0", "acme/terraform:1.0.0", "acme/sql:1.0.0"]
    assert search(shelf, *asked, "--loads-in", "vllm:8") == ["acme/terraform:1.0.0", "acme/sql:1.0.0"]
    items = shelf.json("search", *asked, "--loads-in", "vllm:8", "--include", "refused")["items"]
    loading = {item["repository"]: item["loads_in"] for item in items}
    assert loading["acme/sql"] == {"profile": "vllm:8", "loads": True, "reasons": [], "way_out": []}
    assert not loading["beta/help"]["loads"]
    assert "different scales" in loading["beta/help"]["reasons"][0]
    assert "vllm:8 refuses it" in shelf.ok("search", "--loads-in", "vllm:8", "--include", "refused").out
    refused = shelf("search", "--loads-in", "vllm:12")
    assert refused.code == 2
    assert "max_lora_rank must be one of" in refused.err


@pytest.mark.on("PostgreSQL")
def test_words_facts_and_channels_narrow_a_search(shelf: Cli) -> None:
    assert search(shelf, "tickets", "trained") == ["beta/help:1.0.0", "acme/terraform:1.0.0", "acme/sql:1.0.0"]
    assert search(shelf, "terra") == ["acme/terraform:1.0.0"]
    assert search(shelf, "SQL") == ["acme/sql:1.0.0"]
    assert search(shelf, "sqlx") == []
    assert search(shelf, "--targets-exact", "v_proj,q_proj") == ["acme/sql:1.0.0"]
    assert search(shelf, "--targets-include", "o_proj") == ["acme/terraform:1.0.0"]
    assert search(shelf, "--min-rank", "3", "--namespace", "acme") == ["acme/sql:1.0.0"]
    assert search(shelf, "--repository", "beta/help") == ["beta/help:1.0.0"]
    assert search(shelf, "--max-size-bytes", "10") == []
    assert search(shelf, "--alpha", "0") == []
    shelf.ok("promote", "acme/sql", "--to", "prod")
    assert search(shelf, "--channel", "prod") == ["acme/sql:1.0.0"]
    shelf.ok("yank", "acme/sql:1.0.0", "--reason", "wrong data")
    assert search(shelf, "--channel", "prod") == []
    assert search(shelf, "--namespace", "acme") == ["acme/terraform:1.0.0"]
    assert search(shelf, "--namespace", "acme", "--include-yanked") == ["acme/terraform:1.0.0", "acme/sql:1.0.0"]


@pytest.mark.long
def test_a_channel_that_falls_back_is_searched_where_it_stands(stocked: Cli, world: World) -> None:
    for version, name in (("1.0.0", "sql"), ("1.0.1", "other-sql")):
        stocked.ok("push", world.adapters[name], f"acme/sql:{version}", "--base", "tiny", "--channel", "prod")
    assert search(stocked, "--channel", "prod") == ["acme/sql:1.0.1"]
    assert search(stocked, "--latest") == ["acme/sql:1.0.1"]
    stocked.ok("yank", "acme/sql:1.0.1", "--reason", "wrong data")
    assert search(stocked, "--channel", "prod") == ["acme/sql:1.0.0"]
    assert search(stocked, "--latest") == ["acme/sql:1.0.0"]


def test_releases_for_a_cast_of_the_base_are_found_on_request_and_say_so(
    shelf: Cli, world: World, tmp_path: Path
) -> None:
    cast = changed_base(world.base, tmp_path / "cast", lambda tensor: tensor.half())
    tuned = changed_base(world.base, tmp_path / "tuned", lambda tensor: tensor + 1)
    shelf.ok("base", "add", cast, "--name", "tiny-half", "--derived-from", "tiny", "--relation", "cast")
    added = shelf.json(
        "base", "add", tuned, "--name", "tiny-tuned", "--derived-from", "tiny", "--relation", "finetuned"
    )
    assert (added["derived_from"]["name"], added["relation"]) == ("tiny", "finetuned")
    shelf.ok("push", world.adapters["sql"], "acme/half:1.0.0", "--base", "tiny-half")
    shelf.ok("push", world.adapters["sql"], "acme/tuned:1.0.0", "--base", "tiny-tuned")
    assert search(shelf, "--base", "tiny-half") == ["acme/half:1.0.0"]
    items = shelf.json("search", "--base", "tiny-half", "--include", "related", "--namespace", "acme")["items"]
    assert [(item["repository"], item["related"] and item["related"]["relation"]) for item in items] == [
        ("acme/half", None), ("acme/terraform", "cast"), ("acme/sql", "cast"),
    ]  # fmt: skip
    assert items[1]["related"]["base"]["name"] == "tiny-half"
    assert items[1]["base"]["name"] == "tiny"
    assert "not for tiny-half: cast" in shelf.ok("search", "--base", "tiny-half", "--include", "related").out
    assert "acme/tuned:1.0.0" not in search(shelf, "--base", "tiny", "--include", "related")


def test_a_relation_between_bases_is_checked(stocked: Cli, world: World, tmp_path: Path) -> None:
    cast = changed_base(world.base, tmp_path / "cast", lambda tensor: tensor.half())
    refused = stocked("base", "add", cast, "--name", "half", "--derived-from", "tiny")
    assert refused.code == 2
    assert "both what it is derived from and how" in refused.err
    stocked.ok("base", "add", cast, "--name", "half")
    stocked.ok("base", "add", cast, "--name", "half", "--derived-from", "tiny", "--relation", "cast")
    stocked.ok("base", "add", cast, "--name", "half", "--derived-from", "tiny", "--relation", "cast")
    circular = stocked("base", "add", world.base, "--name", "tiny", "--derived-from", "half", "--relation", "cast")
    assert (circular.code, "itself derived from" in circular.err) == (6, True)
    corrected = stocked.json("base", "add", cast, "--name", "half", "--derived-from", "tiny", "--relation", "merged")
    assert corrected["relation"] == "merged", "the owner of a registry may correct what was said"
    unknown = stocked("base", "add", cast, "--name", "half", "--derived-from", "nothing", "--relation", "merged")
    assert unknown.code == 3


def changed_base(base: Path, target: Path, change: Callable) -> Path:
    shutil.copytree(base, target)
    for shard in target.glob("*.safetensors"):
        save_file({name: change(tensor) for name, tensor in load_file(shard).items()}, shard, {"format": "pt"})
    return target


@pytest.mark.long
def test_pages_do_not_shift_when_releases_arrive(shelf: Cli, world: World) -> None:
    first = shelf.json("search", "--limit", "2")
    shelf.ok("push", world.adapters["other-sql"], "acme/newer:1.0.0", "--base", "tiny")
    second = shelf.json("search", "--limit", "2", "--cursor", first["next"])
    names = [item["repository"] for item in (*first["items"], *second["items"])]
    assert names == ["beta/help", "acme/terraform", "acme/sql"]
    assert second["next"] is None
    by_version = shelf.json("search", "--sort", "version", "--limit", "1")
    assert by_version["items"][0]["repository"] == "acme/newer"


SORTED_BY: dict[str, Callable[[dict], int]] = {
    "size": lambda item: sum(file["size_bytes"] for file in item["files"]),
    "rank": lambda item: item["adapter"]["rank_max"],
}


@pytest.mark.parametrize("order", SORTED_BY)
def test_the_smallest_come_first_page_by_page(shelf: Cli, order: str) -> None:
    items: list[dict] = []
    cursor: tuple[str, ...] | None = ()
    while cursor is not None:
        page = shelf.json("search", "--sort", order, "--limit", "1", *cursor)
        items += page["items"]
        cursor = ("--cursor", page["next"]) if page["next"] else None
    facts = [SORTED_BY[order](item) for item in items]
    assert len({item["repository"] for item in items}) == 3
    assert facts == sorted(facts)
    newest = shelf.json("search", "--limit", "1")["next"]
    assert shelf("search", "--sort", order, "--limit", "1", "--cursor", newest).code == 2


def test_words_are_found_a_page_at_a_time_past_newer_releases_without_them(shelf: Cli, world: World) -> None:
    shelf.ok("push", world.adapters["other-sql"], "acme/newer:1.0.0", "--base", "tiny")
    asked = ("tickets", "trained", "--limit", "1")
    first = shelf.json("search", *asked)
    second = shelf.json("search", *asked, "--cursor", first["next"])
    last = shelf.json("search", *asked, "--cursor", second["next"])
    names = [item["repository"] for page in (first, second, last) for item in page["items"]]
    assert (names, last["next"]) == (["beta/help", "acme/terraform", "acme/sql"], None)


def test_a_cursor_belongs_to_its_search(shelf: Cli) -> None:
    cursor = shelf.json("search", "--limit", "1")["next"]
    for other in (("--sort", "version"), ("--namespace", "acme"), ("--sort", "sql-exact.nll")):
        refused = shelf("search", "--limit", "1", "--cursor", cursor, *other)
        assert (refused.code, "does not belong to this search" in refused.err) == (2, True)
    assert search(shelf, "--limit", "5", "--cursor", cursor) == ["acme/terraform:1.0.0", "acme/sql:1.0.0"]
    for forged in ("x", "!!!", "W10", "WyJhIiwgbnVsbCwgMV0"):
        assert shelf("search", "--cursor", forged).code == 2


def test_a_misspelt_parameter_is_named_with_what_was_meant(
    pairing: dict[str, str], tmp_path: Path, world: World
) -> None:
    with serving(pairing, tmp_path) as cli, httpx2.Client(base_url=cli.environment["ADAPTORY_URL"]) as http:
        stock(cli, world)
        refused = http.get("/v1/releases", params={"max_rnk": 8}).json()
        assert (refused["status"], refused["code"], refused["subject"]) == (400, "unknown_parameter", "max_rnk")
        assert refused["next"] == "Did you mean max_rank?"
        assert "targets_within" in http.get("/v1/releases", params={"zzz": 1}).json()["next"]
        for path, wrong, meant in (("/v1/audit", "subjects", "subject"), ("/v1/audit.jsonl", "untl", "until")):
            refused = http.get(path, params={wrong: "2026-01-31"}).json()
            assert (refused["code"], refused["subject"]) == ("unknown_parameter", wrong)
            assert refused["next"] == f"Did you mean {meant}?"
        assert http.get("/healthz", params={"verbose": 1}).json()["next"] == "Leave it out."
        assert http.get("/v1/releases", params={"facets": "rank"}).status_code == 422
        repeated = http.get("/v1/releases", params={"targets_within": ["q_proj", "v_proj,o_proj"]})
        assert repeated.status_code == 200
        for bad in ({"base": "nothing"}, {"score": "nosuite.accuracy>=0"}, {"sort": "nosuite.accuracy"}):
            assert http.get("/v1/releases", params=bad).status_code == 404
        for bad in (
            {"sort": "oldest"},
            {"score": "x"},
            {"repository": "x"},
            {"channel": "A B"},
        ):
            assert http.get("/v1/releases", params=bad).status_code == 400
        for words in ("%", "a b c d e f g h i"):
            assert http.get("/v1/releases", params={"text": words}).status_code == 422
        for bad in ({"max_rank": "x"}, {"limit": 501}, {"include": "all"}, {"alpha": "nan"}, {"kind": "base"}):
            assert http.get("/v1/releases", params=bad).status_code == 422


@pytest.mark.on("SQLite")
def test_a_condition_that_is_empty_is_refused_and_not_left_out(shelf: Cli) -> None:
    for flag, value in (
        ("--targets-within", ","),
        ("--targets-exact", ""),
        ("--targets-include", " , "),
        ("--include", ""),
        ("--base", ""),
        ("--repository", ""),
        ("--channel", " "),
        ("--loads-in", ""),
        ("--score", ""),
        ("--provenance", ""),
    ):
        refused = shelf("search", flag, value, "--json")
        error = refused.json["error"]
        assert (refused.code, error["code"]) == (2, "empty_parameter"), flag
        assert flag in error["next"]
    assert len(search(shelf, "--targets-within", "q_proj,v_proj,")) == 2, "a comma too many does no harm"
    assert len(search(shelf, "")) == 3


def test_a_metric_that_nobody_has_is_unknown_and_one_that_nobody_has_yet_finds_nothing(
    shelf: Cli, world: World
) -> None:
    for asked in (("--sort", "sql-exact.acuracy"), ("--score", "sql-exact.acuracy>=0.1")):
        refused = shelf("search", *asked, "--json")
        assert (refused.code, refused.json["error"]["code"]) == (3, "metric_unknown")
        assert "accuracy" in refused.json["error"]["next"]
    assert search(shelf, "--sort", "sql-exact.accuracy") == []
    (suite,) = [row for row in shelf.json("suite", "list")["items"] if row["name"] == "sql-exact"]
    score = {"suite_digest": suite["digest"], "metric": "f1", "value": 0.5, "n": 1, "higher_is_better": True}
    with api_of(shelf) as api:
        api.post("/v1/adapters/acme/sql/releases/1.0.0/scores", {"scores": [score]})
    assert search(shelf, "--sort", "sql-exact.f1") == ["acme/sql:1.0.0"]
    assert search(shelf, "--sort", "sql-exact.f1", "--namespace", "beta") == []


def test_the_suite_of_a_release_is_where_it_gained_most_or_is_best_if_its_base_was_not_measured(shelf: Cli) -> None:
    digests = {row["name"]: row["digest"] for row in shelf.json("suite", "list")["items"]}

    def record(path: str, **nll: float) -> str | None:
        for name, value in nll.items():
            score = {"suite_digest": digests[f"{name}-exact"], "metric": "nll", "value": value, "n": 6}
            api.post(f"{path}/scores", {"scores": [score | {"higher_is_better": False}]})
        answer: str | None = api.get("/v1/adapters/acme/sql/releases/1.0.0/target-suite")["target_suite"]
        return answer

    with api_of(shelf) as api:
        assert record("/v1/adapters/acme/sql/releases/1.0.0", sql=0.1, support=4.0) == "sql-exact"
        assert record("/v1/bases/tiny", support=4.5) == "sql-exact", "one gain alone decides nothing"
        assert record("/v1/bases/tiny", sql=0.2) == "support-exact"


def test_the_best_come_first_with_documents_that_keep_to_their_schema(
    pairing: dict[str, str], tmp_path: Path, world: World
) -> None:
    with serving(pairing, tmp_path) as cli, httpx2.Client(base_url=cli.environment["ADAPTORY_URL"]) as http:
        stock(cli, world)
        digest = http.get("/v1/suites/guard-exact").json()["digest"]
        for name, nll in (("sql", 0.5), ("terraform", 0.25), ("support", 0.75)):
            cli.ok("push", world.adapters[name], f"acme/{name}:1.0.0", "--base", "tiny")
            score = {"suite_digest": digest, "metric": "nll", "value": nll, "n": 6, "higher_is_better": False}
            posted = http.post(f"/v1/adapters/acme/{name}/releases/1.0.0/scores", json={"scores": [score]})
            assert posted.status_code == 200
        assert search(cli, "--sort", "guard-exact.nll") == [
            "acme/terraform:1.0.0", "acme/sql:1.0.0", "acme/support:1.0.0",
        ]  # fmt: skip
        assert search(cli, "--sort", "guard-exact.nll", "--score", "guard-exact.nll>=0.5") == [
            "acme/sql:1.0.0", "acme/support:1.0.0",
        ]  # fmt: skip
        asked = {"base": "tiny", "loads_in": "vllm:8", "include": "refused,related"}
        items = http.get("/v1/releases", params=asked).json()["items"]
        assert len([FoundOut.model_validate(item) for item in items]) == 3
        assert items[0]["scores"][0]["value"] == 0.75
        counted = http.get("/v1/releases", params={"facets": "base,kind,measured", "limit": 1}).json()
        facets = FoundPage.model_validate(counted).facets or {}
        assert [(choice.value, choice.count, choice.more) for choice in facets["base"]] == [("tiny", 3, False)]
        assert [choice.value for choice in facets["kind"]] == ["adapter"]
        assert {choice.value: choice.count for choice in facets["measured"]}["guard-exact.nll"] == 3
        following = http.get("/v1/releases", params={"cursor": counted["next"]}).json()
        assert (len(following["items"]), "facets" in following) == (2, False)
        listed = http.get("/v1/adapters/acme/sql/releases").json()["items"]
        shown = http.get("/v1/adapters/acme/sql/releases/1.0.0").json()
        assert listed == [shown] == [ReleaseOut.model_validate(shown).model_dump(mode="json")]
        slim = http.get("/v1/resolve", params={"ref": "acme/sql"}).json()
        assert ResolvedOut.model_validate(slim).model_dump(mode="json") == slim
        assert {name: shown[name] for name in ("repository", "version", "commit", "files", "base")} == {
            name: slim["release"][name] for name in ("repository", "version", "commit", "files", "base")
        }
        suite = http.get("/v1/adapters/acme/sql/releases/1.0.0/target-suite").json()
        assert suite == {"target_suite": None}
