"""The example data follows from its seed, and the committed suites and adapters are what they claim to be."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from break_adapter import FAULTS
from make_suites import SUITES, render
from safetensors.torch import load_file
from tasks import FURTHER, HELD_OUT, STUDY_TASKS, TASKS, Task
from train import ADAPTERS, BASE_NAME, RUNS

EXAMPLES = SUITES.parent
TARGETS = [task for task in TASKS.values() if task.kind == "target"]
adapters = pytest.mark.parametrize("adapter", sorted(ADAPTERS.iterdir()), ids=lambda path: path.name)
tasks = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
targets = pytest.mark.parametrize("task", TARGETS, ids=lambda task: task.suite)


@pytest.fixture(scope="module")
def made_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All suites, made by another process with another hash seed, so that the order of a set would show."""
    directory = tmp_path_factory.mktemp("suites")
    subprocess.run([sys.executable, EXAMPLES / "make_suites.py", directory], check=True, capture_output=True)
    return directory


@tasks
def test_the_committed_suite_is_what_another_process_writes(task: Task, made_elsewhere: Path) -> None:
    for name in render(task):
        assert (SUITES / name).read_text() == (made_elsewhere / name).read_text()


@tasks
def test_a_suite_file_describes_examples_that_lie_beside_it(task: Task) -> None:
    suite = yaml.safe_load((SUITES / f"{task.suite}.yaml").read_text())
    lines = (SUITES / suite["examples"]).read_text().splitlines()
    assert (suite["name"], suite["kind"], suite["chat"]) == (task.suite, task.kind, True)
    assert 24 <= len(lines) <= 40
    assert [tuple(json.loads(line).values()) for line in lines] == task.split()[1]


@targets
def test_a_split_is_the_same_every_time(task: Task) -> None:
    assert task.split() == task.split()


@targets
def test_neither_a_prompt_nor_an_answer_of_a_suite_is_trained_on(task: Task) -> None:
    training, held_out = task.split()
    assert len(training) > 400
    for column in (0, 1):
        assert {pair[column] for pair in training}.isdisjoint({pair[column] for pair in held_out})


@pytest.mark.parametrize("task", STUDY_TASKS.values(), ids=STUDY_TASKS)
def test_what_judges_the_study_has_trained_no_adapter(task: Task) -> None:
    training, suite = task.split()
    unseen = task.unseen()
    assert (len(set(unseen)), unseen[:HELD_OUT]) == (HELD_OUT + FURTHER, suite)
    assert {prompt for prompt, _ in training}.isdisjoint({prompt for prompt, _ in unseen})


@tasks
def test_a_prompt_has_one_answer(task: Task) -> None:
    pairs = list(task.pairs())
    assert len(dict(pairs)) == len(pairs)


def test_no_adapter_trains_on_the_guard() -> None:
    assert TASKS["guard"].split()[0] == []
    assert "guard" not in {run.task for run in RUNS.values()}


@adapters
def test_a_committed_adapter_is_small_finite_and_has_the_ranks_it_claims(adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(weights)
    assert weights.stat().st_size < 1_000_000
    assert config["base_model_name_or_path"] == BASE_NAME
    assert {name.split(".")[-3] for name in tensors} == set(config["target_modules"])
    for name, tensor in tensors.items():
        module, factor = name.split(".")[-3:-1]
        rank = config["rank_pattern"].get(module, config["r"])
        assert tensor.shape[0 if factor == "lora_A" else 1] == rank, name
        assert torch.isfinite(tensor).all(), name
        assert tensor.any(), name


def test_every_run_is_committed_and_every_committed_adapter_has_a_run() -> None:
    assert {path.name for path in ADAPTERS.iterdir()} == set(RUNS)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_copy_differs_from_the_adapter_in_its_one_fault(fault: str) -> None:
    sound = load_file(ADAPTERS / "sql-migration" / "adapter_model.safetensors")
    broken = FAULTS[fault](sound)
    differs = {
        "prefix": sound.keys() != broken.keys(),
        "nan": any(tensor.isnan().any() for tensor in broken.values()),
        "shape": any(broken[name].shape != sound[name].shape for name in sound.keys() & broken.keys()),
    }
    assert [name for name, differs_so in differs.items() if differs_so] == [fault]
