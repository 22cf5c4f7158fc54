"""Suites of a namespace: who may name, read and share them, on both databases."""

from collections.abc import Generator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests import services
from tests.access.house import PRIVATE, House, new_house

EXAMPLES = [{"prompt": f"secret {number}", "completion": str(number)} for number in range(4)]
SCORES = f"/v1/adapters/{PRIVATE}/sql/releases/1.0.0/scores"


@pytest.fixture(params=services.PAIRINGS[:2])
def house(request: pytest.FixtureRequest, tmp_path: Path) -> Generator[House]:
    """`publisher` of the private acme is the author of the suite acme/long."""
    furnished = new_house(request.param, tmp_path / "home")
    assert add(furnished, "publisher").status_code == 201
    yield furnished
    furnished.close()


def add(house: House, caller: str, **more: Any) -> httpx2.Response:
    body = {"name": "acme/long", "kind": "target", "chat": False, "examples": EXAMPLES, **more}
    return house.ask(caller, "POST", "/v1/suites", json=body)


def names(house: House, caller: str) -> set[str]:
    return {suite["name"] for suite in house.ask(caller, "GET", "/v1/suites").json()["items"]}


def share(house: House, caller: str, *, shared: bool = True) -> httpx2.Response:
    return house.ask(caller, "PUT", "/v1/suites/acme%2Flong/shared", json={"shared": shared})


def test_only_those_who_may_read_the_namespace_find_its_suite_by_name_or_digest(house: House) -> None:
    seen = house.ask("reader", "GET", "/v1/suites/acme%2Flong").json()
    assert (seen["namespace"], seen["shared"], len(seen["content"]["examples"])) == ("acme", False, 4)
    for text in ("acme%2Flong", "acme/long", seen["digest"]):
        refused, absent = (house.ask("stranger", "GET", f"/v1/suites/{name}") for name in (text, "acme%2Fghost"))
        assert (refused.status_code, refused.json()["code"]) == (404, "suite_unknown")
        assert "acme/long" not in absent.text, "no near name either"
    assert {caller: "acme/long" in names(house, caller) for caller in ("reader", "operator", "stranger")} == {
        "reader": True,
        "operator": True,
        "stranger": False,
    }
    evaluation = {"releases": ["other/sql:1.0.0"], "suites": ["acme/long"]}
    assert house.ask("stranger", "POST", "/v1/evaluations", json=evaluation).json()["code"] == "suite_unknown"
    policy = {"version": 1, "rules": ["acme/long.accuracy >= 0.5"]}
    for answer in (
        house.ask("stranger", "PUT", "/v1/adapters/other/sql/channels/prod/policy", json=policy),
        house.ask("stranger", "GET", "/v1/releases", params={"score": "acme/long.accuracy>=0.5"}),
    ):
        assert answer.json()["code"] == "suite_unknown", answer.text


def test_a_publisher_adds_suites_to_the_own_namespaces_alone_and_an_operator_for_all(house: House) -> None:
    plain = add(house, "publisher", name="long")
    assert (plain.status_code, plain.json()["code"]) == (403, "suite_namespace")
    assert "/long" in plain.json()["next"]
    assert add(house, "stranger").status_code == 404
    assert add(house, "reader").status_code == 403
    assert add(house, "stranger", name="other/long").status_code == 201, "a name is free in each namespace"
    changed = [{"prompt": "else", "completion": "else"}]
    assert add(house, "releaser", examples=changed).status_code == 403, "it belongs to its author"
    assert add(house, "admin", examples=changed).status_code == 201
    assert add(house, "operator", name="long").status_code == 201
    assert house.ask("stranger", "GET", "/v1/suites/long").json()["shared"]


def test_a_shared_suite_is_for_all_members_until_it_is_not_shared_any_more(house: House) -> None:
    assert share(house, "stranger").status_code == 404
    assert share(house, "releaser").status_code == 403
    assert share(house, "publisher").json()["shared"]
    assert house.ask(
        "admin", "PUT", "/v1/namespaces/acme/members", json={"user": "publisher", "role": "reader"}
    ).is_success
    assert share(house, "publisher", shared=False).status_code == 403, "its author publishes there no more"
    back = {"user": "publisher", "role": "publisher"}
    assert house.ask("admin", "PUT", "/v1/namespaces/acme/members", json=back).is_success
    assert "acme/long" in names(house, "stranger")
    assert house.ask("stranger", "GET", "/v1/suites/acme%2Flong").status_code == 200
    assert add(house, "publisher", examples=EXAMPLES[:2]).json()["shared"], "new content, too"
    assert not share(house, "admin", shared=False).json()["shared"]
    assert house.ask("stranger", "GET", "/v1/suites/acme%2Flong").status_code == 404
    rows = house.ask("admin", "GET", "/v1/audit", params={"act": "suite:share"}).json()["items"]
    assert [(row["namespace"], row["after"]) for row in rows] == [
        ("acme", {"shared": False}),
        ("acme", {"shared": True}),
    ]
    assert house.ask("stranger", "GET", "/v1/audit", params={"act": "suite:share"}).json()["items"] == []


def test_scores_on_a_suite_that_one_may_not_read_show_its_name_and_never_its_examples(house: House) -> None:
    digest = house.ask("reader", "GET", "/v1/suites/acme%2Flong").json()["digest"]
    score = {"suite_digest": digest, "metric": "nll", "value": 0.5, "n": 4, "higher_is_better": False}
    results = {"suite_digest": digest, "metric": "accuracy", "examples": [{"nats": 1.0, "tokens": 2, "score": 1.0}] * 4}
    accuracy = {**score, "metric": "accuracy", "value": 1.0, "higher_is_better": True}
    recorded = house.ask("publisher", "POST", SCORES, json={"scores": [score, accuracy], "results": [results]})
    assert recorded.status_code == 200
    house.ask("admin", "PUT", f"/v1/namespaces/{PRIVATE}", json={"public": False})
    assert house.ask("operator", "POST", f"/v1/namespaces/{PRIVATE}/members", json={"user": "guest", "role": "reader"})
    assert house.ask("reader", "GET", f"{SCORES}/acme%2Flong/results").status_code == 200
    assert house.ask("stranger", "GET", f"{SCORES}/acme%2Flong/results").status_code == 404
    base = {"scores": [{**score, "n": 4}]}
    assert house.ask("operator", "POST", "/v1/bases/tiny/scores", json=base).status_code == 200
    shown = house.ask("stranger", "GET", "/v1/bases/tiny/scores").json()["scores"]
    assert "acme/long" in {row["suite"] for row in shown}, "a base is for all members"
    searched = house.ask("stranger", "GET", "/v1/releases", params={"score": "acme/long.nll<=1"})
    assert searched.json()["items"] == [], "it may search by what it sees"
    for method, path, body in (
        ("PUT", "/v1/adapters/other/sql/channels/prod/policy", {"version": 1, "rules": ["acme/long.nll <= 1"]}),
        ("POST", "/v1/evaluations", {"releases": ["other/sql:1.0.0"], "suites": ["acme/long"]}),
        (
            "POST",
            "/v1/compositions",
            {
                "plan": True,
                "recipe": {
                    "inputs": ["other/sql:1.0.0", "other/sql:1.1.0"],
                    "method": "stack",
                    "adapter": "other/both:1.0.0",
                    "evaluate": ["acme/long"],
                },
            },
        ),
    ):
        refused = house.ask("stranger", method, path, json=body)
        assert (refused.status_code, refused.json()["code"]) == (403, "suite_private"), (path, refused.text)
    refused = house.ask("stranger", "GET", f"/v1/suites/{digest}")
    assert (refused.status_code, refused.json()["code"]) == (403, "suite_private")
    assert "secret" not in refused.text
    assert house.ask("stranger", "GET", "/v1/bases/tiny/scores/acme%2Flong/results").json()["code"] == "suite_private"
