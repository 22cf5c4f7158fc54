"""Model cards: the provenance that they state, and that no card can do harm."""

import json
import time
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from composer.errors import InvalidFile
from composer.formats.checkpoints import card
from composer.formats.checkpoints.card import (
    card_provenance,
    front_matter,
    load_mapping,
    made_card,
    parse_provenance,
    provenance,
)
from registry.wire.catalog import Provenance

FULL = """---
license: apache-2.0
base_model: [HuggingFaceTB/SmolLM2-135M]
library_name: peft
tags: [lora, sql]
datasets: [acme/queries, {name: acme/schemas, digest: "sha256:ab", license: mit}]
trainer: trl 0.20
run_url: https://runs.example/17
code_commit: 0123abc
base_license: apache-2.0
hyperparameters: {learning_rate: 1e-4, epochs: 3, betas: [0.9, 0.999], packing: true, seed: null}
model-index: [{name: x, results: []}]
---
# SQL
"""


def test_a_card_says_where_an_adapter_comes_from() -> None:
    fields, findings = card_provenance(FULL.encode())
    assert findings == []
    assert fields == {
        "license": "apache-2.0",
        "base_model": "HuggingFaceTB/SmolLM2-135M",
        "library_name": "peft",
        "tags": ["lora", "sql"],
        "data": [{"name": "acme/queries"}, {"name": "acme/schemas", "digest": "sha256:ab", "license": "mit"}],
        "trainer": "trl 0.20",
        "run_url": "https://runs.example/17",
        "code_commit": "0123abc",
        "base_license": "apache-2.0",
        "hyperparameters": {"learning_rate": 1e-4, "epochs": 3, "betas": [0.9, 0.999], "packing": True},
    }


@pytest.mark.parametrize(
    ("stated", "fields"),
    [
        ("license: other\nlicense_name: acme-1", {"license": "acme-1"}),
        ("license: [mit, apache-2.0]", {"license": "mit AND apache-2.0"}),
        ("license: [mit OR isc, zlib]", {"license": "(mit OR isc) AND zlib"}),
        ("license: [other]\nlicense_name: acme-1", {"license": "acme-1"}),
        ("code_commit: 1234567", {"code_commit": "1234567"}),
        ("code_commit: 0123456", {"code_commit": "0123456"}),
        ("trainer: 2026-01-02", {"trainer": "2026-01-02"}),
        ("tags: lora", {"tags": ["lora"]}),
        ("datasets: acme/queries", {"data": [{"name": "acme/queries"}]}),
        ("license:", {}),
        ("language: en\nwidget: []", {}),
    ],
)
def test_cards_are_read_as_people_write_them(stated: str, fields: dict[str, Any]) -> None:
    for ends in ("\n", "\r\n"):
        text = f"---\n{stated}\n---\ntext".replace("\n", ends)
        assert card_provenance(text.encode()) == (fields, [])


@pytest.mark.parametrize("content", [b"", b"# SQL", b"text\n---\nlicense: mit\n---\n", b"---\n---\n", b"--- \n\n---"])
def test_a_card_without_front_matter_says_nothing(content: bytes) -> None:
    assert card_provenance(content) == ({}, [])


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(12)
)
HOSTILE = {
    "billion laughs": (BOMB, "aliases"),
    "deep nesting": ("a: " + "[" * 30_000, "nested"),
    "deep mappings": ("".join("  " * n + "a:\n" for n in range(150)), "nested"),
    "python objects": ("a: !!python/object/apply:os.system [id]", "not YAML"),
    "huge number": ("a: " + "9" * 6_000, "not YAML"),
    "no mapping": ("- license: mit", "not a mapping"),
    "keys of all kinds": ("{1: 2, [3]: 4}", "not"),
    "tabs": ("\tlicense: mit", "not YAML"),
    "too long": ("license: mit\n" + "# " * card.FRONT_MATTER_BYTES, "does not end"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_card_is_one_warning_and_costs_little(kind: str) -> None:
    text, why = HOSTILE[kind]
    began = time.monotonic()
    fields, (finding,) = card_provenance(f"---\n{text}\n---\n".encode())
    assert fields == {}
    assert (finding.code, finding.severity, finding.subject) == ("provenance", "warning", card.CARD_FILE)
    assert why in finding.message
    assert time.monotonic() - began < 5


def test_a_card_shows_any_phrase_as_it_is_and_no_share_of_the_sum_beside_phrases() -> None:
    phrases = {"a": "As `SQL` | or not:", "b": "In short."}
    made = made_card("Adapter", ["x", "y"], "regmean", "keeps 0 % of the sum; x 51 %, y 59 %", {"phrases": phrases})
    assert "| a | `` As `SQL` \\| or not: `` |" in made
    assert "| b | `In short.` |" in made
    assert "of the sum" not in made, "a release with all answers left keeps 0 % of it"
    assert card_provenance(made.encode()) == ({"phrases": phrases}, [])
    assert "It keeps 43 % of the sum." in made_card("Adapter", ["x", "y"], "svd", "keeps 43 % of the sum", {})


def test_an_endless_front_matter_is_not_read_to_its_end() -> None:
    with pytest.raises(InvalidFile, match="does not end"):
        front_matter(b"---\n" + b"a: b\n" * 1_000_000)


@pytest.mark.parametrize(
    ("stated", "left_out"),
    [
        ({"trainer": ["a", "b"]}, "trainer"),
        ({"trainer": "x" * 1001}, "trainer"),
        ({"run_url": {"a": 1}}, "run_url"),
        ({"license": "x" * 101}, "license"),
        ({"license": "a\0b"}, "license"),
        ({"code_commit": "\ud800"}, "code_commit"),
        ({"data": [{"digest": "ab"}]}, "data"),
        ({"data": [{"name": "a", "size": 3}]}, "data"),
        ({"data": ["a"] * 101}, "data"),
        ({"hyperparameters": [1]}, "hyperparameters"),
        ({"hyperparameters": {"lr": float("nan")}}, "hyperparameters"),
        ({"hyperparameters": {"nested": {"deep": 1}}}, "hyperparameters"),
        ({"hyperparameters": {f"h{n}": n for n in range(201)}}, "hyperparameters"),
        ({"tags": [{"a": 1}]}, "tags"),
    ],
)
def test_a_part_of_the_wrong_form_is_left_out_with_a_warning_and_refused_when_stated(
    stated: dict[str, Any], left_out: str
) -> None:
    fields, findings = provenance({**stated, "library_name": "peft"})
    assert fields == {"library_name": "peft"}
    assert [(finding.severity, finding.subject) for finding in findings] == [("warning", left_out)]
    with pytest.raises(InvalidFile, match=left_out):
        parse_provenance(stated, "provenance.yaml")


def test_a_misspelt_name_is_refused_where_somebody_states_it() -> None:
    with pytest.raises(InvalidFile, match=r"run_ulr.*run_url"):
        parse_provenance(load_mapping("run_ulr: https://runs.example/17", "provenance.yaml"), "provenance.yaml")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30) | st.dates(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)
names = st.sampled_from([*card.FIELDS, "datasets", "license_name", "language", "name"])


@given(st.dictionaries(names, values, max_size=8))
@example({"hyperparameters": {"a" * 1001: 1}})
@example({"hyperparameters": {"": 1}})
@example({"data": [{"name": None}]})
def test_whatever_a_card_states_can_be_kept_and_shown_again(stated: dict[str, Any]) -> None:
    fields, _ = provenance(stated)
    assert json.loads(json.dumps(fields, allow_nan=False)) == fields
    assert "\\u0000" not in json.dumps(fields)
    Provenance(**fields).model_dump_json()
    assert provenance(fields) == (fields, [])


@given(st.binary(max_size=300) | st.text("-:[]{}&*!|>'\"#%@`?,\n a1é", max_size=200).map(lambda text: text.encode()))
def test_whatever_bytes_a_card_has_it_is_read_or_warned_of(content: bytes) -> None:
    for text in (content, b"---\n" + content + b"\n---\n"):
        fields, findings = card_provenance(text)
        json.dumps(fields, allow_nan=False)
        assert all(finding.severity == "warning" for finding in findings)
