"""Files of users are saved by browsers and never shown as pages of the server, and the server answers only to its own
names."""

import re
import socket
from collections.abc import Generator
from pathlib import Path

import httpx2
import pytest

from tests import services
from tests.access.browser import Browser
from tests.access.house import PRIVATE, House, entered, new_house
from tests.access.test_exchanges import RELEASE
from tests.scenarios.world import server

NAMES = "adapters.example, Files.Example,::1"


@pytest.fixture(scope="module", params=services.PAIRINGS)
def furnished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Generator[House]:
    house = new_house(request.param, tmp_path_factory.mktemp("house"))
    yield house
    house.close()


def is_inert(answer: httpx2.Response) -> bool:
    headers = answer.headers
    return (
        headers["content-disposition"].startswith("attachment")
        and headers["content-security-policy"] == "sandbox; default-src 'none'; frame-ancestors 'none'"
        and headers["x-content-type-options"] == "nosniff"
        and headers.get("content-type", "application/octet-stream") == "application/octet-stream"
    )


def test_a_file_of_a_user_is_an_attachment_in_a_sandbox_by_every_way(furnished: House) -> None:
    file = f"/{PRIVATE}/sql/resolve/1.0.0/weights.safetensors"
    blob = f"/v1/blobs/{furnished.things[PRIVATE].sha256}"
    for path in (f"{RELEASE}/files/weights.safetensors", file, blob):
        answer = furnished.ask("publisher", "GET", path)
        assert answer.status_code in (200, 307), path
        assert is_inert(answer), path
        if answer.status_code == 307:
            signed = httpx2.URL(answer.headers["location"]).params
            assert signed["response-content-disposition"] == "attachment"
            assert signed["response-content-type"] == "application/octet-stream"
        else:
            part = furnished.ask("publisher", "GET", path, headers={"Range": "bytes=1-2"})
            beyond = furnished.ask("publisher", "GET", path, headers={"Range": "bytes=1000000-"})
            assert (part.status_code, is_inert(part)) == (206, True)
            assert (beyond.status_code, is_inert(beyond)) == (416, True)
    for path in (file, blob):
        assert is_inert(furnished.ask("publisher", "HEAD", path)), path


def test_a_file_from_a_page_has_its_name_and_the_sandbox_of_a_file(furnished: House) -> None:
    with Browser(furnished) as browser:
        browser.sign_in(furnished.secrets["reader"])
        answer = browser.open(f"/{PRIVATE}/sql/1.0.0/files/weights.safetensors")
    assert is_inert(answer)
    assert "weights.safetensors" in answer.headers["content-disposition"]


@pytest.mark.on("PostgreSQL")
def test_no_answer_leaves_a_browser_to_guess_its_type(furnished: House) -> None:
    for path in ("/", "/healthz", "/v1/whoami", "/v1/nothing", RELEASE, "/openapi.json", "/static/0/x.css"):
        answer = furnished.ask("reader", "GET", path)
        assert answer.headers.get_list("x-content-type-options") == ["nosniff"], path


def test_a_server_answers_to_its_names_alone(furnished: House) -> None:
    house = entered(furnished, furnished.environ, hosts=NAMES)
    for name in ("adapters.example", "ADAPTERS.example:8470", "files.example", "[::1]:80"):
        assert house.ask("reader", "GET", "/v1/whoami", headers={"Host": name}).status_code == 200, name
    for name in ("evil.example", "adapters.example.evil.example", "127.0.0.1", "", "[", "xadapters.example"):
        answer = house.ask("reader", "GET", "/v1/whoami", headers={"Host": name})
        assert (answer.status_code, answer.json()["code"]) == (421, "unknown_host"), name
        assert "adapters.example" in answer.json()["next"]
    for path in ("/healthz", "/readyz"):
        assert house.ask("nobody", "GET", path, headers={"Host": "10.0.0.7:8470"}).status_code == 200
    house.close()


def test_two_hosts_are_refused(tmp_path: Path) -> None:
    with server(tmp_path / "home") as (url, _process):
        address = httpx2.URL(url)
        with socket.create_connection((address.host, address.port)) as connection:
            lines = [
                "GET /healthz HTTP/1.1",
                f"Host: {address.netloc.decode()}",
                "Host: evil.example",
                "Connection: close",
            ]
            connection.sendall("\r\n".join([*lines, "", ""]).encode())
            answer = b""
            while block := connection.recv(4096):
                answer += block
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b'"bad_http"' in answer


@pytest.mark.on("PostgreSQL")
def test_files_of_users_come_from_a_host_of_their_own_by_signed_addresses(furnished: House) -> None:
    """If the store has addresses, files come from the store's host already."""
    own = {"files_url": "https://files.example", "files_secret": "x" * 32}
    house = entered(furnished, furnished.environ, hosts="adapters.example", **own)
    main, files = {"Host": "adapters.example"}, {"Host": "files.example"}
    path = f"/{PRIVATE}/sql/resolve/1.0.0/weights.safetensors"
    sent = house.ask("reader", "GET", path, headers=main)
    assert (sent.status_code, is_inert(sent)) == (307, True)
    if "files.example" not in sent.headers["location"]:
        assert "response-content-disposition" in sent.headers["location"]
        return
    address = sent.headers["location"].removeprefix("https://files.example")
    got = house.ask("nobody", "GET", address, headers=files)
    assert (got.status_code, is_inert(got), len(got.content)) == (200, True, int(sent.headers["x-linked-size"]))
    part = house.ask("nobody", "GET", address, headers={**files, "Range": "bytes=1-2"})
    assert (part.status_code, part.content) == (206, got.content[1:3])
    assert house.ask("nobody", "GET", address, headers=main).status_code == 421, "the registry's own host has no files"
    for other in ("/", "/v1/whoami", path, RELEASE):
        assert house.ask("reader", "GET", other, headers=files).status_code == 421, other
    other_file = furnished.things[PRIVATE].sha256[::-1]
    for forged in (
        address.replace("signature=", "signature=0"),
        address.replace("expires=1", "expires=2"),
        re.sub(r"files/[0-9a-f]{64}", f"files/{other_file}", address),
        f"{address}&disposition=inline",
        address.partition("?")[0] + "?expires=1&signature=" + "0" * 64,
    ):
        assert house.ask("publisher", "GET", forged, headers=files).status_code in (404, 422), forged
    with Browser(house, "https://adapters.example") as browser:
        assert browser.sign_in(house.secrets["reader"]).status_code == 303
        page = browser.http.get(f"/{PRIVATE}/sql/1.0.0/files/weights.safetensors", follow_redirects=False)
    named = house.ask("nobody", "GET", page.headers["location"].removeprefix("https://files.example"), headers=files)
    assert "weights.safetensors" in named.headers["content-disposition"]
    assert named.headers["content-disposition"].startswith("attachment")
