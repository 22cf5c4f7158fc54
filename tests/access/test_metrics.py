"""A suite's author decides which direction of a metric is better, without learning what others measure privately."""

from collections.abc import Generator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from composer.formats.recipes.suite import Suite, parse_suite
from registry.domain.access.audit import EventQuery, list_oldest_first
from tests import services
from tests.access.house import House, new_house

SUITE = {"name": "acme/long", "kind": "target", "description": "", "chat": False}
EXAMPLES = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]


@pytest.fixture(params=services.PAIRINGS[:2])
def house(request: pytest.FixtureRequest, tmp_path: Path) -> Generator[House]:
    """`publisher` of the private acme is the author of the shared suite acme/long."""
    furnished = new_house(request.param, tmp_path / "home")
    assert add(furnished, "publisher").status_code == 201
    assert furnished.ask("publisher", "PUT", "/v1/suites/acme/long/shared", json={"shared": True}).status_code == 200
    yield furnished
    furnished.close()


def add(house: House, caller: str, **more: Any) -> httpx2.Response:
    return house.ask(caller, "POST", "/v1/suites", json={**SUITE, "examples": EXAMPLES, **more})


def record(house: House, caller: str, namespace: str, better: bool, metric: str = "f1") -> httpx2.Response:
    digest = house.ask(caller, "GET", "/v1/suites/acme/long").json()["digest"]
    score = {"suite_digest": digest, "metric": metric, "value": 0.5, "n": 1, "higher_is_better": better}
    path = f"/v1/adapters/{namespace}/sql/releases/1.0.0/scores"
    return house.ask(caller, "POST", path, json={"scores": [score]})


def test_who_records_a_metric_first_decides_nothing_and_its_author_does(house: House) -> None:
    refused = record(house, "stranger", "other", better=False)
    assert (refused.status_code, refused.json()["code"]) == (422, "metric_unstated")
    assert "Ask publisher" in refused.json()["next"]
    assert record(house, "publisher", "acme", better=True).status_code == 200
    wrong = record(house, "publisher", "acme", better=False)
    assert (wrong.status_code, wrong.json()["code"]) == (422, "bad_score")
    assert record(house, "releaser", "acme", better=False).status_code == 422
    assert record(house, "releaser", "acme", better=True).status_code == 200


@pytest.mark.parametrize("number", [{"value": 1e101}, {"value": -1e101}, {"stderr": 1e101}, {"nats": 1e101}])
def test_numbers_whose_squares_are_not_finite_are_refused(house: House, number: dict[str, float]) -> None:
    assert record(house, "publisher", "acme", better=True).status_code == 200
    digest = house.ask("publisher", "GET", "/v1/suites/acme/long").json()["digest"]
    score = {"suite_digest": digest, "metric": "f1", "value": 0.5, "n": 1, "higher_is_better": True}
    body: dict[str, Any] = {"scores": [{**score, **number}]}
    if "nats" in number:
        example = {"tokens": 1, "score": 0.5, **number}
        body = {"scores": [score], "results": [{"suite_digest": digest, "metric": "f1", "examples": [example]}]}
    refused = house.ask("publisher", "POST", "/v1/adapters/acme/sql/releases/1.0.0/scores", json=body)
    assert (refused.status_code, refused.json()["code"]) == (422, "bad_request" if "nats" in number else "bad_score")


def test_a_stranger_is_answered_alike_whatever_was_measured_in_private(house: House) -> None:
    asked = [(caller, better) for caller in ("stranger", "narrowed") for better in (True, False)]

    def answers() -> list[tuple[int, str]]:
        tried = [record(house, caller, "other", better) for caller, better in asked]
        tried += [house.ask("stranger", "GET", "/v1/releases", params={"sort": "acme/long.f1"})]
        tried += [house.ask("stranger", "GET", "/v1/suites/acme/long"), house.ask("stranger", "GET", "/v1/suites")]
        return [(answer.status_code, answer.text.replace(answer.headers["X-Request-Id"], "")) for answer in tried]

    before = answers()
    assert record(house, "publisher", "acme", better=True).status_code == 200
    assert answers() == before
    assert record(house, "publisher", "open", better=True).status_code == 200, "now everybody may see it"
    assert record(house, "stranger", "other", better=True).status_code == 200


def test_the_file_of_a_suite_states_its_metrics_and_its_author_corrects_them(house: House) -> None:
    digest = house.ask("stranger", "GET", "/v1/suites/acme/long").json()["digest"]
    assert add(house, "releaser", metrics={"f1": "higher"}).json()["code"] == "not_yours"
    stated = add(house, "publisher", metrics={"f1": "lower", "rouge_l": "higher"})
    assert (stated.status_code, stated.json()["digest"]) == (200, digest), "scores that are there stay"
    assert house.ask("stranger", "GET", "/v1/suites/acme/long").json()["metrics"] == {
        "f1": "lower",
        "rouge_l": "higher",
    }
    assert record(house, "stranger", "other", better=True).status_code == 422
    assert record(house, "stranger", "other", better=False).status_code == 200
    shown = house.ask("stranger", "GET", "/v1/adapters/other/sql/releases/1.0.0").json()["scores"]
    assert [score["higher_is_better"] for score in shown if score["metric"] == "f1"] == [False]
    assert add(house, "releaser", metrics={"f1": "lower"}).status_code == 200, "what is stated already changes nothing"

    assert add(house, "publisher", metrics={"f1": "higher"}).status_code == 200
    assert house.ask("stranger", "GET", "/v1/suites/acme/long").json()["metrics"] == {
        "f1": "higher",
        "rouge_l": "higher",
    }
    shown = house.ask("stranger", "GET", "/v1/adapters/other/sql/releases/1.0.0").json()["scores"]
    assert [score["higher_is_better"] for score in shown if score["metric"] == "f1"] == [True]
    with house.resources.read() as session:
        rows = list_oldest_first(session, EventQuery(act="suite:metric"))
        assert [(row.actor, row.before, row.after) for row in rows if row.detail["metric"] == "f1"] == [
            ("publisher", None, {"higher_is_better": False}),
            ("publisher", {"higher_is_better": False}, {"higher_is_better": True}),
        ]
    longer = [*EXAMPLES, {"prompt": "e", "completion": "f"}]
    assert add(house, "publisher", examples=longer).json()["metrics"]["f1"] == "higher", "of all versions"


def test_what_eval_measures_is_better_in_one_way_alone(house: House) -> None:
    assert add(house, "publisher", metrics={"nll": "higher"}).json()["code"] == "bad_metric"
    assert add(house, "publisher", metrics={"nll": "lower"}).status_code == 200
    assert record(house, "stranger", "other", better=True, metric="nll").status_code == 422
    assert record(house, "stranger", "other", better=False, metric="nll").status_code == 200


def test_who_recorded_a_score_deletes_it_and_the_audit_keeps_it(house: House) -> None:
    assert record(house, "publisher", "acme", better=False, metric="nll").status_code == 200
    path = "/v1/adapters/acme/sql/releases/1.0.0/scores/acme/long/nll"
    refused = house.ask("releaser", "DELETE", path)
    assert (refused.status_code, refused.json()["code"]) == (403, "not_yours")
    deleted = house.ask("publisher", "DELETE", path)
    assert (deleted.status_code, deleted.json()["value"]) == (200, 0.5)
    assert house.ask("publisher", "DELETE", path).json()["code"] == "score_unknown"
    shown = house.ask("reader", "GET", "/v1/adapters/acme/sql/releases/1.0.0").json()["scores"]
    assert [score["suite"] for score in shown] == ["exact"]
    assert house.ask("admin", "DELETE", path.replace("acme/long", "exact")).status_code == 200
    rows = house.ask("admin", "GET", "/v1/audit", params={"act": "score:delete"}).json()["items"]
    assert [(row["actor"], row["before"]["measured_by"]) for row in rows] == [
        ("admin", "host"),
        ("publisher", "publisher"),
    ]


@pytest.mark.parametrize("metrics", [["f1"], {"f1": "up"}, {"F 1": "higher"}, {1: "higher"}, {"f1": None}, "higher"])
def test_metrics_of_another_form_are_refused_by_name(metrics: object, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="suite: metrics") as raised:
        Suite.from_json({**SUITE, "examples": EXAMPLES, "metrics": metrics})
    assert raised.type.__name__ == "InvalidFile"


def test_what_a_suite_states_of_its_metrics_is_not_in_its_digest(tmp_path: Path) -> None:
    text = "name: acme/long\nkind: target\nchat: false\nexamples: [{prompt: a, completion: b}]\n"
    (tmp_path / "plain.yaml").write_text(text)
    (tmp_path / "stated.yaml").write_text(f"{text}metrics: {{rouge_l: higher, seconds: lower}}\n")
    plain, stated = parse_suite(tmp_path / "plain.yaml"), parse_suite(tmp_path / "stated.yaml")
    assert stated.digest == plain.digest
    assert stated.higher_is_better == {"rouge_l": True, "seconds": False}
    assert Suite.from_json(stated.to_json()) == stated
