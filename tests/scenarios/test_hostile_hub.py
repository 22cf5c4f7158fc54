"""A hub that answers what no hub answers."""

import copy
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from registry.errors import RegistryError
from registry.hub_client.address import parse_hub_address
from registry.hub_client.remote import Hub
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
