"""The traces of a request and its answer: an id, a line of the log, a problem document."""

import json
import logging
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest

from registry.api.app import create_app
from registry.api.routes import compositions as routes
from registry.client.inprocess import InProcessTransport
from registry.database.engine import Database
from registry.errors import Invalid, Unavailable
from registry.errors.outages import OutageLog
from tests import services
from tests.access.house import House, new_house
from tests.scenarios.world import server

RELEASE = "/v1/adapters/acme/sql/releases/1.0.0"


@pytest.fixture
def house(tmp_path: Path) -> Generator[House]:
    furnished = new_house(services.PAIRINGS[0], tmp_path / "home")
    yield furnished
    furnished.close()


def logged(house: House, form: Any) -> House:
    transport = InProcessTransport(create_app(house.resources, tokens=True, access_log=form))
    return House(house.environ, house.resources, house.things, house.secrets, house.ids, transport)


def test_every_answer_has_an_id_and_a_problem_repeats_it(house: House) -> None:
    for path, status in ((RELEASE, 200), ("/nowhere", 404), (f"{RELEASE}?x=1", 400), ("/v1/tokens", 200)):
        answer = house.ask("reader", "GET", path)
        assert (answer.status_code, len(answer.headers["X-Request-Id"])) == (status, 32)
        if status >= 400:
            assert answer.json()["request_id"] == answer.headers["X-Request-Id"]
    given = house.ask("reader", "GET", "/nowhere", headers={"X-Request-Id": "proxy-7.a"})
    assert (given.headers["X-Request-Id"], given.json()["request_id"]) == ("proxy-7.a", "proxy-7.a")
    for hostile in ("a b", "x" * 65, 'a"status=200'):
        assert (
            house.ask("reader", "GET", "/healthz", headers={"X-Request-Id": hostile}).headers["X-Request-Id"] != hostile
        )


def test_what_nobody_foresaw_has_an_id_too(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(routes.compositions, "roles_needed", fail)
    recipe = {"base": "tiny", "inputs": [{"adapter": "acme/sql:1.0.0"}], "method": "stack"}
    answer = house.ask("admin", "POST", "/v1/compositions", json={"recipe": recipe, "plan": True})
    assert (answer.status_code, answer.json()["code"]) == (500, "internal_error")
    assert answer.json()["request_id"] == answer.headers["X-Request-Id"]


@pytest.mark.parametrize("form", ["text", "json"])
def test_the_access_log_says_who_asked_what_and_how_it_went_and_no_secret(
    house: House, form: str, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = logged(house, form)
    answers = [
        asked.ask("publisher", "GET", f"{RELEASE}?secret=hush"),
        asked.ask("publisher", "GET", "/v1/adapters/acme/sql/releases"),
        asked.ask("nobody", "GET", "/v1/bases/hush"),
        asked.ask("reader", "GET", "/openapi.json"),
        asked.ask("reader", "GET", "/hush/and/no/page"),
    ]
    text, deadline = capfd.readouterr().err, time.monotonic() + 10
    while text.count("request_id") < len(answers) and time.monotonic() < deadline:  # a line follows its answer
        text += capfd.readouterr().err
    lines = text.splitlines()
    assert not [secret for secret in (*house.secrets.values(), "hush") if secret in text]
    if form == "json":
        rows = [json.loads(line) for line in lines]
    else:
        rows = [dict(part.split("=", 1) for part in line.split(" ")) for line in lines]
    none = None if form == "json" else "-"
    assert [(str(row["status"]), row["route"], row["actor"]) for row in rows] == [
        ("400", "/v1/adapters/{namespace}/{name}/releases/{version}", none),
        ("200", "/v1/adapters/{namespace}/{name}/releases", "publisher"),
        ("401", "/v1/bases/{base}", "anonymous"),
        ("200", "/openapi.json", none),
        ("404", none, none),
    ]
    assert [row["request_id"] for row in rows] == [answer.headers["X-Request-Id"] for answer in answers]
    assert all(0 <= float(row["seconds"]) < 60 and row["method"] == "GET" for row in rows)


def test_no_access_log_says_nothing(house: House, capfd: pytest.CaptureFixture[str]) -> None:
    logged(house, "off").ask("reader", "GET", RELEASE)
    assert capfd.readouterr().err == ""


def test_a_slash_at_the_end_leads_nowhere(house: House) -> None:
    for path in ("/v1/suites/", "/v1/tokens/", "/v1/adapters/", f"{RELEASE}/", "/healthz/"):
        answer = house.ask("operator", "GET", path, headers={"Host": "evil.example"})
        assert (answer.status_code, answer.headers.get("location")) == (404, None), path


def test_openapi_says_how_a_caller_is_known_and_what_may_go_wrong(house: House) -> None:
    document = house.ask("operator", "GET", "/openapi.json").json()
    assert document["components"]["securitySchemes"] == {"bearer": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            errors = {status: said for status, said in operation["responses"].items() if status >= "4"}
            is_open = path in ("/healthz", "/readyz", "/v1/files/{sha256}", "/v1/sign-in/logout")
            expected = [] if is_open else [{"bearer": []}]
            assert operation["security"][:1] == expected, path
            assert {"400", "503"} <= set(errors), (method, path)
            assert ("401" in errors) == bool(expected)
            for status, said in errors.items():
                if status != "default":
                    assert "application/problem+json" in said["content"], (path, status)
    move = document["paths"]["/v1/adapters/{namespace}/{name}/channels/{channel}"]["put"]
    assert {"401", "403", "404", "409", "412", "413", "422", "429"} <= set(move["responses"])


def test_a_user_cannot_be_called_as_callers_without_a_token_or_the_registry_are(house: House) -> None:
    for user in ("anonymous", "Anonymous ", "registry"):
        made = house.ask("operator", "POST", "/v1/tokens", json={"user": user})
        assert (made.status_code, made.json()["code"]) == (422, "user_reserved")
        granted = house.ask("operator", "PUT", "/v1/namespaces/acme/members", json={"user": user, "role": "admin"})
        assert granted.json()["code"] == "user_reserved"


def test_an_outage_is_one_line_a_second(caplog: pytest.LogCaptureFixture) -> None:
    database = Database("postgresql+psycopg://nobody@127.0.0.1:1/nothing")
    with caplog.at_level(logging.WARNING), ThreadPoolExecutor(8) as pool:

        def ask(_number: int) -> None:
            with pytest.raises(Unavailable), database.read():
                pass

        began = time.monotonic()
        list(pool.map(ask, range(100)))
        seconds = time.monotonic() - began
    lines = [record for record in caplog.records if "database cannot be used" in record.getMessage()]
    assert 1 <= len(lines) <= 1 + seconds
    database.close()


def test_the_next_line_of_an_outage_counts_what_was_left_out(caplog: pytest.LogCaptureFixture) -> None:
    outages = OutageLog(logging.getLogger("test"))
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            outages.warn("It is away", "gone")
        time.sleep(1.05)
        outages.warn("It is away", "gone")
    assert [record.getMessage() for record in caplog.records] == [
        "It is away: gone",
        "It is away: gone (4 more like this since the last line)",
    ]


def test_beside_a_json_access_log_every_warning_is_an_object_too() -> None:
    code = """
import logging.config
from registry.cli.operations.server import JSON_LOG
from registry.errors.outages import OutageLog
logging.config.dictConfig(JSON_LOG)
OutageLog(logging.getLogger("registry.storage")).warn("The store is away", "gone\\nGET /forged 200")
try:
    raise RuntimeError("a defect")
except RuntimeError:
    logging.getLogger("uvicorn.error").exception("Exception in ASGI application")
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr
    outage, defect = (json.loads(line) for line in said.splitlines())
    assert (outage["level"], outage["logger"]) == ("warning", "registry.storage")
    assert outage["message"] == "The store is away: gone\nGET /forged 200"
    assert "RuntimeError: a defect" in defect["traceback"]
    assert [*outage][:1] == ["at"]


def test_what_is_not_http_is_answered_by_a_problem(tmp_path: Path) -> None:
    with server(tmp_path / "home") as (url, _process):
        address = httpx2.URL(url)
        with socket.create_connection((address.host, address.port)) as connection:
            connection.sendall(b"NONSENSE\r\n\r\n")
            answer = b""
            while block := connection.recv(4096):
                answer += block
    head, _, body = answer.partition(b"\r\n\r\n")
    problem = json.loads(body)
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"application/problem+json" in head
    assert (problem["code"], f"x-request-id: {problem['request_id']}".encode() in head) == ("bad_http", True)


def test_an_address_of_a_download_ends_soon_and_pins_what_others_would_believe(tmp_path: Path) -> None:
    furnished = new_house(services.PAIRINGS[1], tmp_path / "home")
    answer = furnished.ask("reader", "GET", f"{RELEASE}/files/weights.safetensors")
    furnished.close()
    signed = httpx2.URL(answer.headers["location"]).params
    assert (answer.status_code, signed["X-Amz-Expires"]) == (307, "300")
    assert signed["response-cache-control"] == "private, immutable"
    assert signed["response-content-type"] == "application/octet-stream"


def test_a_name_for_anonymous_is_refused_before_anything_else() -> None:
    from registry.domain.access.roles import refuse_reserved

    refuse_reserved("anonymouse")
    with pytest.raises(Invalid, match="callers without a token"):
        refuse_reserved("ANONYMOUS")
