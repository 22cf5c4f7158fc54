"""Thousands of malformed adapters, cards and recipes: one clear error each, and no memory for false claims."""

import json
import os
import tempfile
import tracemalloc
from collections import Counter
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from composer.errors import InvalidFile, Mismatch, NotSupported
from composer.formats.adapters.inspection import inspect
from composer.formats.checkpoints.card import card_provenance
from composer.formats.recipes.recipe import load_recipe, parse_recipe
from tests.fuzz.malformed import BASE, HARMS, Adapter, junk, malformed

FACTOR = int(os.environ.get("ADAPTORY_TEST_FUZZ", "1"))
"""A multiple of the usual number of cases; `make test-long` tests five times as many."""
MOST_CHARACTERS = 4_000
MANY = settings(
    max_examples=250 * FACTOR, deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=True
)


@pytest.fixture
def directory() -> Generator[Path]:
    """A directory in memory if possible: a disk would take most of the time."""
    memory = Path("/dev/shm")  # noqa: S108
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as made:
        yield Path(made)


def errors_of(adapter: Path) -> list[tuple[str, str, str]]:
    """(code, subject, message) of its errors; raises any error that is not ours."""
    try:
        findings = inspect(adapter, BASE).findings
    except (InvalidFile, NotSupported, Mismatch) as error:
        return [(error.code, error.subject, error.message)]
    return [(finding.code, finding.subject, finding.message) for finding in findings if finding.severity == "error"]


def assert_clear(errors: list[tuple[str, str, str]], what: object) -> None:
    assert errors, what
    for code, subject, message in errors:
        assert code, what
        assert subject, what
        assert len(message) <= MOST_CHARACTERS, (what, len(message))
        (subject + message).encode()  # or no answer could carry it


def test_the_adapter_that_the_others_are_made_of_is_good(directory: Path) -> None:
    assert errors_of(Adapter().write(directory / "good")) == []


@pytest.mark.long
def test_a_thousand_malformed_adapters_are_one_clear_error_each(directory: Path) -> None:
    seen: Counter[str] = Counter()

    @settings(MANY, max_examples=1_000 * FACTOR)
    @given(malformed())
    def look(adapter: Adapter) -> None:
        errors = errors_of(adapter.write(directory / "adapter"))
        assert_clear(errors, adapter.wrong)
        seen[adapter.wrong] += 1

    look()
    assert seen.total() >= 1_000 * FACTOR
    assert set(seen) == {harm.__name__ for harm in HARMS}


@MANY
@given(at=st.integers(0), bit=st.integers(0, 7))
def test_a_flipped_bit_anywhere_is_an_error_or_another_good_adapter(at: int, bit: int) -> None:
    with tempfile.TemporaryDirectory() as made:
        path = Adapter().write(Path(made) / "adapter")
        file = path / ("adapter_config.json" if at % 3 == 0 else "adapter_model.safetensors")
        content = bytearray(file.read_bytes())
        content[at % len(content)] ^= 1 << bit
        file.write_bytes(content)
        if errors := errors_of(path):
            assert_clear(errors, (file.name, at % len(content), bit))


CLAIMS = {
    "a header of 2^60 bytes": (2**60).to_bytes(8, "little"),
    "a header of 2^64 - 1 bytes": (2**64 - 1).to_bytes(8, "little"),
    "a tensor of 2^60 elements": {"dtype": "F32", "shape": [2**60], "data_offsets": [0, 2**62]},
    "a tensor of 2^900 elements": {"dtype": "F32", "shape": [2**60] * 15, "data_offsets": [0, 2**62]},
    "a tensor that ends at 2^62": {"dtype": "U8", "shape": [2**62], "data_offsets": [0, 2**62]},
    "a rank of 2^60": {"dtype": "F32", "shape": [2**60, 0], "data_offsets": [0, 0]},
}


@pytest.mark.parametrize("claim", CLAIMS)
@pytest.mark.parametrize("sparse", [False, True], ids=["in a small file", "in a file of a terabyte of holes"])
def test_what_a_header_claims_costs_nothing(directory: Path, claim: str, sparse: bool) -> None:
    claimed = CLAIMS[claim]
    adapter = Adapter()
    if isinstance(claimed, bytes):
        adapter.weights_bytes = claimed + b"{}"
    else:
        adapter.header = {next(name for name in adapter.header if name.endswith("lora_A.weight")): claimed}
    path = adapter.write(directory / "adapter")
    if sparse:
        os.truncate(path / "adapter_model.safetensors", 2**40)
    errors_of(Adapter().write(directory / "first"))  # lazy loading is not part of the cost
    tracemalloc.start()
    errors = errors_of(path)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert_clear(errors, claim)
    assert peak_bytes < 1_000_000


@MANY
@given(
    st.binary(max_size=300) | st.text(st.characters(), max_size=300).map(lambda t: t.encode("utf-8", "replace")), junk
)
def test_any_model_card_is_provenance_and_warnings(body: bytes, value: object) -> None:
    for card in (body, b"---\n" + body + b"\n---\nHello", f"---\ndata: {json.dumps(value)}\n---\n".encode()):
        fields, findings = card_provenance(card)
        json.dumps(fields, allow_nan=False, ensure_ascii=False).encode()
        for finding in findings:
            assert finding.severity == "warning"
            assert len(finding.message) <= MOST_CHARACTERS
            finding.message.encode()


good_recipe = {"inputs": ["acme/sql"], "method": "linear", "settings": {}, "probe": 2, "gates": [], "evaluate": []}


@MANY
@given(st.sampled_from([*good_recipe, "base", "dtype", "notes", "adapter", "unknown"]), junk)
def test_any_recipe_is_read_or_refused_with_its_key(key: str, value: object) -> None:
    try:
        recipe = parse_recipe({**good_recipe, key: value})
    except InvalidFile as error:
        assert_clear([(error.code, error.subject, error.message)], (key, value))
    else:
        json.dumps(recipe.to_json(), allow_nan=False, ensure_ascii=False).encode()


@MANY
@given(st.text(max_size=200) | junk.map(lambda value: f"inputs: {json.dumps(value)}"))
def test_any_text_is_a_recipe_or_refused(text: str) -> None:
    try:
        load_recipe(text)
    except InvalidFile as error:
        assert_clear([(error.code, error.subject, error.message)], text)


BOMBS = {
    "aliases": "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 25)),
    "nesting": "inputs: " + "[" * 50_000,
    "a number of a million digits": "probe: " + "9" * 1_000_000,
    "a date": "notes: 2026-13-45",
    "a merge of itself": "a: &a\n  <<: *a",
    "a tag": "inputs: !!python/object/apply:os.system [ls]",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_recipe_and_a_card_that_cost_more_than_they_say_are_refused_at_once(bomb: str) -> None:
    with pytest.raises(InvalidFile) as refused:
        load_recipe(BOMBS[bomb])
    assert_clear([(refused.value.code, refused.value.subject, refused.value.message)], bomb)
    assert card_provenance(f"---\n{BOMBS[bomb]}\n---\n".encode())[0] == {}
