"""The model card of an export: statements of the release's own card stay unchanged."""

from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from composer.errors import InvalidFile
from composer.formats.checkpoints.card import front_matter
from composer.formats.checkpoints.reported import reported_scores
from registry.formats.addresses import parse_hub_address
from registry.sdk.hub_card import exported_card, results_file
from registry.wire.catalog import BaseOut, ReleaseOut

DIGEST = "ab" * 32
TIMES = {"created_at": "2026-01-01T00:00:00Z", "created_by": "ann"}
BASE = BaseOut.read(
    {"digest": DIGEST, "architecture_digest": DIGEST, "name": "tiny", "aliases": ["tiny-2", "Acme/Tiny"]}
    | {"locations": ["file:///models/tiny"], "model_type": "llama", "tied": True, "parameters": 1, "size_bytes": 1}
    | {"tensor_count": 1, "scores": [], "derived_from": None, "relation": None, "license": None, "deprecated": None}
    | TIMES
)
FACTS = {
    "type": "LORA", "variant": "lora", "rank_max": 8, "alpha": 16.0, "targets": [], "modules": 1, "parameters": 1,
    "size_bytes": 1, "dtype": "F32", "modules_to_save": [], "use_rslora": False, "ranks": {}, "alphas": {},
    "base_model_name_or_path": None, "peft_version": None,
}  # fmt: skip


def score(suite: str, metric: str, value: float, **more: Any) -> dict[str, Any]:
    row = {"suite": suite, "suite_digest": DIGEST, "kind": "target", "task": "exact", "metric": metric, "value": value}
    row |= {"stderr": None, "n": 6, "source": None, "higher_is_better": metric != "nll", "reported": False}
    return row | {"measured": "2026-01-01T00:00:00Z"} | more


def release(*scores: dict[str, Any], notes: str = "", license_: str | None = None) -> ReleaseOut:
    document = {
        "repository": "acme/sql", "version": "1.0.0", "kind": "adapter", "commit": "ab" * 20, "notes": notes,
        "base": {"digest": DIGEST, "name": "tiny"}, "adapter": FACTS, "model": None, "scores": list(scores),
        "licenses": {"adapter": license_, "base": None, "data": []}, "yanked": False, "yank_reason": None,
        "taken_down": None, "deprecated": None, "base_deprecated": None, "files": [], "inputs": [], "provenance": {},
        "servers": [], "loading": {}, "signed_by": None, "signature_covers": None, "signed_as": None,
        "breaking_reason": None,
    }  # fmt: skip
    return ReleaseOut.read(document | TIMES)


def card(existing: str, *scores: dict[str, Any]) -> str:
    return exported_card(release(*scores), BASE, existing.encode()).decode()


def test_a_release_without_a_card_gets_one() -> None:
    made = exported_card(release(notes="More joins.", license_="Apache-2.0"), BASE, None).decode()
    assert yaml.safe_load(made.split("---\n")[1]) == {
        "base_model": "Acme/Tiny", "library_name": "peft", "tags": ["adaptory", "lora"], "license": "apache-2.0",
    }  # fmt: skip
    assert made.endswith("---\n# sql\n\nAn adapter for tiny, released as 1.0.0.\n\nMore joins.\n")


def test_what_a_card_states_stays_as_it_is_written() -> None:
    stated = "# first\nlanguage: no\nlicense:   'mit' # ours\ntags: [a, b]\nbase_model: Other/Name\nrevision: 0123\n"
    made = card(f"---\n{stated}---\nText --- here\n---\nmore")
    assert made == f"---\n{stated}library_name: peft\n---\nText --- here\n---\nmore"
    assert card(made) == made, "nothing is added twice"


@pytest.mark.parametrize("existing", ["", "# Only text\n", "---\n---\n# Only text\n", "\ufeff# Only text\n"])
def test_a_card_without_a_front_matter_gets_one_before_its_text(existing: str) -> None:
    made = card(existing)
    assert front_matter(made.encode())["base_model"] == "Acme/Tiny"
    assert made.endswith(existing.removeprefix("---\n---\n"))


def test_bytes_that_are_not_text_stay_in_the_text_of_a_card() -> None:
    made = exported_card(release(), BASE, b"---\nlicense: mit\n---\n\xff\xfe")
    assert made.endswith(b"---\n\xff\xfe")
    with pytest.raises(InvalidFile):
        exported_card(release(), BASE, b"---\nlicense: \xff\n---\n")


@pytest.mark.parametrize(
    ("stated", "shown"),
    [
        ("base_model: /data/models/tiny\nlicense: mit\n", "Acme/Tiny"),
        ("license: mit\nbase_model: ./tiny\n", "Acme/Tiny"),
        ("base_model: tiny\n", "tiny"),
        ("base_model:\n- Other/One\n- Other/Two\nlicense: mit\n", ["Other/One", "Other/Two"]),
        ("base_model: null\n", "Acme/Tiny"),
    ],
)
def test_a_directory_is_not_shown_as_the_base(stated: str, shown: object) -> None:
    made = front_matter(card(f"---\n{stated}---\n").encode())
    assert made["base_model"] == shown
    assert ("license" in made) is ("license" in stated)


@pytest.mark.parametrize(
    "index",
    [
        "model-index:\n- name: out\n  results: []\n",
        "model-index: [{name: out, results: []}]  # by the trainer\n",
        "model-index:\n  - name: out\n    results:\n      - task: {type: x}\n        dataset: {type: d, name: d}\n"
        "        metrics: [{type: f1, value: 0.25}]\n",
        "model-index: none\n",
        "",
    ],
)
def test_measured_scores_are_added_to_those_that_a_card_reports(index: str) -> None:
    measured = (score("sql-exact", "accuracy", 0.5), score("sql-exact", "nll", 1.5), score("guard", "nll", 2.0))
    reported = score("squad", "f1", 0.9, reported=True)
    made = card(f"---\nlanguage: no\n{index}license: mit\n---\nText", *measured, reported)
    assert made.startswith("---\nlanguage: no\n")
    assert made.endswith("---\nText")
    assert made.count("model-index:") == made.count("license: mit") == 1
    seen, doubts = reported_scores({"README.md": made.encode()})
    rows = {(inputs_.dataset, inputs_.metric): (inputs_.value, inputs_.revision) for inputs_ in seen}
    own = {(result["suite"], result["metric"]): (result["value"], DIGEST) for result in measured}
    assert rows == own | ({("d", "f1"): (0.25, None)} if "f1" in index else {})
    assert doubts == []
    assert len(ModelCard(made).data.eval_results or []) == len(rows), "the hub's client reads the same"
    assert card(made, *measured, reported) == made


def test_a_flow_mapping_is_written_anew() -> None:
    made = card("---\n{license: mit, base_model: /data/x}\n---\nText")
    assert front_matter(made.encode()) == {
        "license": "mit", "base_model": "Acme/Tiny", "library_name": "peft", "tags": ["adaptory", "lora"],
    }  # fmt: skip


@pytest.mark.parametrize("block", ["a: &x [1]\nb: *x\n", "- a\n", "a: [\n", "x: 1\n" * 20_000])
def test_a_front_matter_that_cannot_be_read_is_an_error(block: str) -> None:
    with pytest.raises(InvalidFile, match=r"README\.md"):
        card(f"---\n{block}---\n")


def test_results_have_metrics_for_which_higher_is_better() -> None:
    assert results_file(release(score("squad", "f1", 0.9, reported=True), score("sql-exact", "nll", 1.5))) is None
    written = results_file(release(score("sql-exact", "accuracy", 0.5, stderr=0.125), score("sql-exact", "nll", 1.5)))
    assert written is not None
    path, content = written
    assert path == ".eval_results/adaptory-acme-sql.yaml"
    dataset = {"id": "sql-exact", "task_id": "accuracy", "revision": DIGEST}
    notes = "n=6, standard error 0.125"
    assert yaml.safe_load(content) == [
        {"dataset": dataset, "value": 0.5, "date": "2026-01-01T00:00:00Z", "notes": notes}
    ]
    [seen], _ = reported_scores({path: content})
    assert (seen.dataset, seen.metric, seen.value, seen.config) == ("sql-exact", "accuracy", 0.5, None)


def test_the_base_is_named_as_on_the_hub_that_it_is_from() -> None:
    from_hub = BASE.model_copy(update={"locations": [f"hf://Other/Tiny@{'a' * 40}"]})
    assert front_matter(exported_card(release(), from_hub, None))["base_model"] == "Other/Tiny"
    unknown = BASE.model_copy(update={"aliases": []})
    assert front_matter(exported_card(release(), unknown, None))["base_model"] == "tiny"


def test_addresses_are_written_as_they_are_read() -> None:
    for text in ("hf://gpt2", "hf://Acme/Tiny-1.5B", "hf://Acme/a@refs/pr/1", f"hf://Acme/a@{'0' * 40}"):
        assert str(parse_hub_address(text)) == text
    assert parse_hub_address(f"hf://Acme/a@{'0' * 40}").pinned
    assert not parse_hub_address("hf://Acme/a@main").pinned
