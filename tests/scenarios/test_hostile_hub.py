"""A hub with answers that no real hub gives."""

import copy
import gzip
import json
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from composer.errors import Interrupted
from registry.errors import RegistryError
from registry.formats.addresses import parse_hub_address
from registry.storage.hub import limits
from registry.storage.hub.bases import find_base
from registry.storage.hub.remote import Hub
from tests.scenarios.small_hub import SmallHub, small_hub

ODD: tuple[Any, ...] = (None, [], {}, "x", "", -1, 1.5, True, [[]], {"oid": 1}, "../../../etc/x", "a" * 5000)
FILES = {"config.json": b"{}", "model.safetensors": b"x" * 3000}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Generator[SmallHub]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with small_hub() as hub:
        yield hub


def variants(document: Any) -> Iterator[Any]:
    """The document with one part replaced or left out, for each part."""
    yield from ODD
    items = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in list(items):
        if isinstance(document, dict):
            yield {name: part for name, part in document.items() if name != key}
        for other in variants(value) if isinstance(value, dict | list) else ODD:
            changed = copy.copy(document)
            changed[key] = other
            yield changed


@pytest.mark.long
@pytest.mark.parametrize("answer", ["revision", "tree"])
def test_an_answer_with_any_part_wrong_is_used_or_refused_with_a_code(
    hub: SmallHub, tmp_path: Path, answer: str
) -> None:
    hub.put("acme/sql", FILES)
    documents = list[Any]()
    hub.changed = lambda document: documents.append(document) or document
    client, address = Hub(hub.url), parse_hub_address("hf://acme/sql")
    client.snapshot(address)
    honest = documents[0 if answer == "revision" else 1]
    refused = list[RegistryError]()
    for number, odd in enumerate(variants(honest)):
        hub.changed = lambda document, odd=odd: odd if type(document) is type(honest) else document
        try:
            snapshot = client.snapshot(address)
        except RegistryError as error:
            refused.append(error)
            continue
        target = tmp_path / str(number)
        try:
            client.download(snapshot, FILES.keys() & snapshot.files.keys(), target)
        except RegistryError as error:
            refused.append(error)
    assert number > 100
    assert len(refused) > 50
    assert {error.code for error in refused} <= {
        "hub_refused", "hub_conflict", "hub_unavailable", "hub_revision_unknown", "digest_differs"
    }  # fmt: skip


@pytest.mark.parametrize("body", [b"<html>", b"", b"\xff\xfe", b"[" * 100_000, b'{"sha": NaN', b"9" * 5000])
def test_an_answer_that_is_no_document_is_refused_with_a_code(hub: SmallHub, body: bytes) -> None:
    hub.put("acme/sql", FILES)
    hub.changed = lambda _document: body
    with pytest.raises(RegistryError) as refused:
        Hub(hub.url).snapshot(parse_hub_address("hf://acme/sql"))
    assert refused.value.code in {"hub_refused", "hub_unavailable", "hub_conflict"}


HUGE = 64 << 20
Answer = Callable[[BaseHTTPRequestHandler], None]


def send(handler: BaseHTTPRequestHandler, body: bytes = b"[]", status: int = 200, **headers: str) -> None:
    handler.send_response(status)
    for name, value in {"Content_Length": str(len(body)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    if handler.command == "GET":
        with suppress(OSError):  # the client may have enough
            handler.wfile.write(body)


def endless(handler: BaseHTTPRequestHandler, chunk: bytes = b" " * (1 << 16), pause_s: float = 0) -> None:
    handler.send_response(200)
    handler.end_headers()
    handler.close_connection = True
    ends = time.monotonic() + 30
    with suppress(OSError):
        while time.monotonic() < ends:
            handler.wfile.write(chunk)
            time.sleep(pause_s)


def endless_pages(handler: BaseHTTPRequestHandler) -> None:
    host, number = handler.headers["Host"], str(time.monotonic_ns())
    send(handler, Link=f'<http://{host}{handler.path.partition("?")[0]}?cursor={number}>; rel="next"')


ANSWERS: dict[str, Answer] = {
    "a bomb": lambda handler: send(handler, gzip.compress(b" " * HUGE), Content_Encoding="gzip"),
    "a long one": lambda handler: send(handler, b" " * HUGE),
    "an endless one": endless,
    "a slow one": lambda handler: endless(handler, b" ", 0.05),
    "a silent one": lambda handler: endless(handler, b" ", 1),
    "endless pages": endless_pages,
    "no page": lambda handler: send(handler, Link='<http://[>; rel="next"'),
    "a redirect to itself": lambda handler: send(handler, status=302, Location=handler.path),
    "later": lambda handler: send(handler, status=429, Retry_After="999999999"),
    "much later": lambda handler: send(handler, status=429, ratelimit='"api";r=0;t=999999999'),
}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "DOCUMENTS_S", 1.5)
    monkeypatch.setattr(limits, "READ_S", 0.5)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("answer", ANSWERS)
def test_an_answer_without_an_end_is_refused_soon_with_the_address_of_the_hub(hub: SmallHub, answer: str) -> None:
    hub.put("acme/sql", FILES)
    hub.instead = lambda handler, path: "/tree/" in path and (ANSWERS[answer](handler) or True)
    started = time.monotonic()
    with pytest.raises(RegistryError) as refused:
        Hub(hub.url).snapshot(parse_hub_address("hf://acme/sql"))
    assert time.monotonic() - started < 12
    assert refused.value.code in {"hub_refused", "hub_unavailable"}
    assert hub.url in refused.value.detail


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("answer", ["a bomb", "a long one", "an endless one", "a slow one"])
def test_a_file_brings_no_more_than_the_hub_lists(hub: SmallHub, tmp_path: Path, answer: str) -> None:
    commit = hub.put("acme/sql", {"config.json": b"{}"})

    def instead(handler: BaseHTTPRequestHandler, path: str) -> bool:
        if "/resolve/" not in path:
            return False
        if handler.command == "HEAD":
            send(handler, ETag='"a"', X_Repo_Commit=commit, Content_Length=str(HUGE))
        else:
            ANSWERS[answer](handler)
        return True

    hub.instead = instead
    client = Hub(hub.url)
    snapshot = client.snapshot(parse_hub_address("hf://acme/sql"))
    started = time.monotonic()
    with pytest.raises(RegistryError) as refused:
        client.download(snapshot, ["config.json"], tmp_path / "here")
    assert time.monotonic() - started < 12
    assert refused.value.code in {"hub_refused", "hub_unavailable"}
    assert hub.url in refused.value.detail
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 1 << 20


def is_own(hub: SmallHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if HF_ENDPOINT had named it when the process began."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)


class Cancelled(Interrupted):
    pass


@pytest.mark.parametrize("slow", ["/tree/", "/resolve/"])
def test_a_job_that_is_cancelled_or_whose_worker_stops_waits_for_no_download_of_its_base(
    hub: SmallHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: str
) -> None:
    is_own(hub, monkeypatch)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = hub.put("acme/tiny", FILES)
    since: list[float] = []

    def instead(handler: BaseHTTPRequestHandler, path: str) -> bool:
        if slow not in path or handler.command == "HEAD":
            return False
        since.append(time.monotonic())
        endless(handler, b" ", 0.05)
        return True

    def check() -> None:
        if since:
            raise Cancelled

    hub.instead = instead
    with pytest.raises(Cancelled):
        find_base([f"hf://acme/tiny@{commit}"], 3000, (), check)
    assert time.monotonic() - since[0] < 5


def import_config(directory: Path) -> None:
    client = Hub()
    client.download(client.snapshot(parse_hub_address("hf://acme/sql")), ["config.json"], directory)


@pytest.mark.parametrize("link", ["next", "xet-auth"])
def test_no_other_host_gets_the_users_token(
    hub: SmallHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, link: str
) -> None:
    is_own(hub, monkeypatch)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    commit = hub.put("acme/sql", {"config.json": b"{}"})
    with small_hub() as other:

        def instead(handler: BaseHTTPRequestHandler, path: str) -> bool:
            linked = f'<{other.url}/api/models/acme/sql/x>; rel="{link}"'
            if link == "next" and "/tree/" in path:
                send(handler, Link=linked)
            elif link == "xet-auth" and "/resolve/" in path:
                send(handler, b"{}", ETag='"a"', X_Repo_Commit=commit, X_Xet_Hash="0" * 64, Link=linked)
            else:
                return False
            return True

        hub.instead = instead
        with pytest.raises(RegistryError) as refused:
            import_config(tmp_path)
        assert {token for _, _, token in hub.requests} == {"Bearer hf_secret"}
        assert other.requests == []
    assert (refused.value.code, hub.url in refused.value.detail) == ("hub_refused", True)


def test_what_a_hub_says_changes_no_terminal(hub: SmallHub) -> None:
    body = json.dumps({"error": "no\x1b[2J\x1b]0;you\x07 \u202ere\r\n"}).encode()
    hub.instead = lambda handler, _path: send(handler, body, 400, Content_Type="application/json") or True
    with pytest.raises(RegistryError) as refused:
        Hub(hub.url).snapshot(parse_hub_address("hf://acme/sql"))
    assert refused.value.detail.isprintable()
    assert "[2J" in refused.value.detail, "the rest is what it says"
