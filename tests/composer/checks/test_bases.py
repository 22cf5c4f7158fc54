"""Names of bases: what truly contradicts is a warning, and what only looks different is not."""

from pathlib import Path

import pytest

from composer.checks.bases import contradicting_bases, hub_name, names_of

QUIET = [
    ("./base", "acme/one"),
    ("/srv/one", "zeta/two"),
    ("outputs/base", "zeta/two"),
    ("runs/checkpoint-300", "zeta/two"),
    ("base", "zeta/two"),
    (None, "zeta/two"),
    ("HuggingFaceTB/SmolLM2-135M", "huggingfacetb/smollm2-135m"),
    ("meta-llama/Meta-Llama-3-8B", "NousResearch/Llama-3-8B"),
    ("unsloth/llama-3-8b-bnb-4bit", "meta-llama/Meta-Llama-3-8B"),
    ("TheBloke/Mistral-7B-v0.1-AWQ", "mistralai/Mistral-7B-v0.1"),
    ("meta-llama/Llama-2-7b-hf", "NousResearch/Llama-2-7b"),
    ("/cache/hub/models--acme--one/snapshots/abc", "acme/one"),
]
LOUD = [
    ("acme/one", "zeta/two"),
    ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-360M"),
    ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct"),
    ("mistralai/Mistral-7B-v0.1", "mistralai/Mistral-7B-v0.3"),
    ("/cache/hub/models--acme--one/snapshots/abc", "zeta/two"),
    ("acme/qwen2-7b", "acme/phi2-7b"),
]


@pytest.mark.parametrize(("one", "other"), QUIET)
def test_paths_copies_mirrors_and_other_spellings_contradict_nothing(one: str | None, other: str) -> None:
    assert contradicting_bases([("a", one), ("b", other)], []) == []
    assert contradicting_bases([("a", one)], [other]) == []
    assert contradicting_bases([("a", other)], [one] if one else []) == []


@pytest.mark.parametrize(("one", "other"), LOUD)
def test_two_models_contradict_each_other_among_adapters_and_with_the_base(one: str, other: str) -> None:
    for findings in (contradicting_bases([("a", one), ("b", other)], []), contradicting_bases([("a", one)], [other])):
        assert [finding.code for finding in findings] == ["contradicting_bases"]
        assert other in findings[0].message


def test_a_base_with_several_names_is_contradicted_by_none_of_them() -> None:
    assert contradicting_bases([("a", "zeta/two")], ["acme/one", "zeta/two"]) == []
    assert contradicting_bases([("a", "teknium/OpenHermes-2.5")], ["mistralai/Mistral-7B", "OpenHermes-2.5"]) == []


def test_a_name_that_is_a_directory_here_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub_name("acme/one") == "acme/one"
    (tmp_path / "acme/one").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_name("acme/one") is None


def test_a_checkpoint_is_named_by_its_config_its_directory_and_the_cache_it_lies_in(tmp_path: Path) -> None:
    directory = tmp_path / "models--acme--one/snapshots/0123"
    directory.mkdir(parents=True)
    names = names_of(directory, {"_name_or_path": "acme/parent"})
    assert "acme/parent" in names
    assert "acme/one" in map(hub_name, names)
    assert names_of(Path("base"), {})[-1] == "base"
