"""Every path with tensors, on an accelerator and on the CPU: a merge's bytes, a fit's factors, measured numbers."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from composer.conflicts.evidence.activations import Activations, activations
from composer.conflicts.evidence.outcome import Limits
from composer.conflicts.examine import Evidence, examine
from composer.deltas.tensors import torch_device
from composer.deltas.variants.load import LoadedAdapter
from composer.evaluation.calibration import Calibration
from composer.evaluation.evaluate import examine as measure
from composer.evaluation.hooks import deltas_applied
from composer.evaluation.model import LoadedModel, load_model
from composer.export.combine import combine
from composer.export.extract import extract
from composer.formats.checkpoints.checkpoint import open_checkpoint
from composer.formats.recipes.methods import Regmean, parse_settings
from composer.formats.recipes.rounding import Mode, Rounding
from composer.formats.recipes.suite import CalibrationSet, Suite
from composer.formats.recipes.tasks import Task
from composer.merge.plan import plan_merge
from composer.merge.rebuild import steps_apart
from composer.merge.run import run_merge
from composer.methods.combine import combine_deltas
from composer.optimize.optimize import optimize
from composer.optimize.problem import SearchEffort, SearchMember, SearchProblem
from tests.composer.adapted import relative
from tests.composer.small_model import Load, dense
from tests.composer.tiny import MakeAdapter, MakeModel, tensors_in
from tests.doses import each_value_once, further
from tests.second_device import NoArithmeticOnCpu

CASES: dict[str, tuple[dict[str, object], str, dict[str, object]]] = {
    "a sum": ({"target_modules": "all-linear"}, "stack", {}),
    "DoRA": ({"use_dora": True}, "stack", {}),
    "an election": ({}, "ties", {"density": 0.4}),
    "an election over the model": ({}, "magnitude_prune", {"density": 0.4, "scope": "model"}),
    "random masks": ({}, "dare_ties", {"density": 0.5}),
    "a basis": ({}, "knots_ties", {}),
    "a cut to a rank": ({}, "ties_svd", {"rank": 3}),
    "calibration": ({}, "pico_ties", {}),
    "protection": ({}, "stack", {"protect": 1}),
}


@pytest.mark.parametrize(("case", "dtype"), each_value_once(CASES, [torch.float32, torch.bfloat16]))
def test_a_merge_writes_the_cpus_bytes_up_to_one_rounding(
    case: str, dtype: torch.dtype, accelerator: str, make_model: MakeModel, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    config, method, settings = CASES[case]
    base = make_model(dtype=dtype)
    adapters = [(make_adapter(base, f"a{seed}", seed=seed, **config), 1.0) for seed in (1, 2)]
    for name, device in (("cpu", "cpu"), ("one", accelerator), ("two", accelerator)):
        plan = plan_merge(
            open_checkpoint(base), adapters[: 1 if case == "DoRA" else 2], method, settings, device=device
        )
        assert run_merge(plan, tmp_path / name, device).device == str(torch_device(device))
    cpu, one, two = (tensors_in(tmp_path / name) for name in ("cpu", "one", "two"))
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), "the same every time"
        if dtype is torch.bfloat16:
            assert steps_apart(tensor, cpu[name])[1] == 0, name
        else:
            assert relative(tensor, cpu[name]) < 1e-6, name


def test_stochastic_rounding_draws_the_same_numbers_on_every_device(
    accelerator: str, make_model: MakeModel, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    base = make_model(dtype=torch.bfloat16)
    adapter = make_adapter(base)
    for device in ("cpu", accelerator):
        plan = plan_merge(open_checkpoint(base), [(adapter, 1.0)], rounding=Rounding(Mode.STOCHASTIC, 5), device=device)
        run_merge(plan, tmp_path / device, device)
    cpu, there = tensors_in(tmp_path / "cpu"), tensors_in(tmp_path / accelerator)
    for name, tensor in there.items():
        assert steps_apart(tensor, cpu[name])[1] == 0
        assert int((tensor != cpu[name]).sum()) <= 0.001 * tensor.numel(), "an exact value may differ in its last bit"


def test_an_adapter_is_combined_and_extracted_alike(
    accelerator: str, make_model: MakeModel, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    base = make_model()
    adapters = [(make_adapter(base, f"a{seed}", seed=seed), 1.0) for seed in (1, 2)]
    run_merge(plan_merge(open_checkpoint(base), adapters), tmp_path / "merged", "cpu")
    lost: dict[str, list[float]] = {}
    for device in ("cpu", accelerator):
        architecture = open_checkpoint(base).architecture
        out = tmp_path / device
        out.mkdir()
        combined = combine(adapters, out / "combined", architecture, "tsv", {"rank": 3}, device=device)
        both = open_checkpoint(base), open_checkpoint(tmp_path / "merged")
        lost[device] = [combined.lost, extract(*both, out / "extracted", rank=3, device=device).lost]
    assert lost[accelerator] == pytest.approx(lost["cpu"], rel=1e-4)
    for name in ("combined", "extracted"):
        ours, theirs = (_products(tmp_path / device / name) for device in (accelerator, "cpu"))
        assert ours.keys() == theirs.keys()
        assert max(relative(ours[module], theirs[module]) for module in ours) < 1e-4


def _products(adapter: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(adapter / "adapter_model.safetensors")
    sides = {name: name.replace("lora_A", "lora_B") for name in tensors if "lora_A" in name}
    return {name: tensors[other] @ tensors[name] for name, other in sides.items()}


@pytest.fixture
def there(base: Path, accelerator: str) -> LoadedModel:
    """The base of the fixture `loaded`, on the accelerator."""
    loaded = load_model(base, accelerator)
    assert loaded.device.type == accelerator
    return loaded


@pytest.fixture
def here(base: Path) -> LoadedModel:
    return load_model(base, "cpu")


def _regmean() -> Regmean:
    settings = parse_settings("regmean")
    assert isinstance(settings, Regmean)
    return settings


def suite(name: str, task: Task = "teacher_forced", count: int = 8) -> Suite:
    choices = ("no", "never") if task == "multiple_choice" else ()
    examples = [
        {"prompt": f"{name} {number}", "completion": f"{number} {name}"}
        | ({"choices": [f"{number} {name}", *choices]} if choices else {})
        for number in range(count)
    ]
    document = {"name": name, "kind": "target", "chat": True, "task": task, "examples": examples}
    return Suite.model_validate(document | ({"generation": {"max_new_tokens": 4}} if task == "generation" else {}))


EVALUATIONS: dict[str, tuple[Task, dict[str, object]]] = {
    "a loss": ("teacher_forced", {}),
    "a loss with DoRA": ("teacher_forced", {"use_dora": True}),
    "a loss with embeddings": ("teacher_forced", {"target_modules": ["embed_tokens", "lm_head"]}),
    "a generated answer": ("generation", {}),
    "a choice": ("multiple_choice", {}),
}


@pytest.mark.parametrize("case", EVALUATIONS)
def test_each_task_has_the_cpus_results(case: str, there: LoadedModel, here: LoadedModel, load: Load) -> None:
    task, config = EVALUATIONS[case]
    deltas, asked = load(case, 3, **config).deltas, suite("red", task, 3)
    with NoArithmeticOnCpu(), deltas_applied(there.model, deltas):
        pass
    for ours, theirs in zip(measure(there, asked, deltas), measure(here, asked, deltas), strict=True):
        assert ours.nats == pytest.approx(theirs.nats, rel=1e-4)
        assert (ours.score, ours.answer) == (theirs.score, theirs.answer)


@pytest.mark.parametrize("settings", [{"steps": 2}, {"steps": 1, "form": "core"}])
def test_regmean_fits_the_cpus_factors(
    settings: Mapping[str, object],
    there: LoadedModel,
    here: LoadedModel,
    red: LoadedAdapter,
    green: LoadedAdapter,
) -> None:
    sets = [CalibrationSet(suite(name), 2) for name in ("red", "green")]
    fitted = {
        loaded.device.type: combine_deltas(
            [red, green], [1.0, 1.0], "regmean", settings, Calibration(lambda loaded=loaded: loaded, sets, _regmean())
            .observe, loaded.device,
        )
        for loaded in (here, there)
    }  # fmt: skip
    ours, theirs = fitted[there.device.type], fitted["cpu"]
    assert ours.fit is not None
    assert theirs.fit is not None
    assert ours.fit.errors == pytest.approx(theirs.fit.errors, rel=1e-3)
    for one, other in zip(ours.deltas, theirs.deltas, strict=True):
        assert relative(dense(one), dense(other)) < 1e-3


@pytest.mark.parametrize("method", ["stack", "ties", *further("regmean")])
def test_a_probe_measures_the_cpus_numbers(
    method: str, there: LoadedModel, here: LoadedModel, red: LoadedAdapter, green: LoadedAdapter
) -> None:
    effects: list[list[float]] = []
    suites = [suite("red"), suite("green")]
    for loaded in (there, here):
        sets = [CalibrationSet(suite, 2) for suite in suites]
        fit_on = Calibration(lambda loaded=loaded: loaded, sets, _regmean()) if method == "regmean" else None
        evidence = Evidence(load=lambda loaded=loaded: loaded, suites=suites, k=2, most=2, calibration=fit_on)
        report = examine([red, green], [1.0, 1.0], parse_settings(method), evidence=evidence)
        assert report.probe is not None
        effects.append([value for effect in report.probe.overall.effects for value in (effect.alone, effect.combined)])
    assert effects[0] == pytest.approx(effects[1], rel=1e-3)


def test_activations_are_the_cpus(
    there: LoadedModel, here: LoadedModel, red: LoadedAdapter, green: LoadedAdapter
) -> None:
    both = {"red": red.deltas, "green": green.deltas}
    ours, theirs = (activations(loaded, both, ["who are you", "abc"]) for loaded in (there, here))
    assert _ratios(ours) == pytest.approx(_ratios(theirs), rel=1e-3)


def _ratios(measured: Activations) -> list[float]:
    return [measured.directed[pair].ratio for pair in sorted(measured.directed)]


@pytest.mark.long
def test_a_search_measures_the_cpus_numbers(
    there: LoadedModel, here: LoadedModel, red: LoadedAdapter, green: LoadedAdapter
) -> None:
    members = [SearchMember(adapter=red, suite=suite("red")), SearchMember(adapter=green, suite=suite("green"))]
    loose = Limits(loss=100.0, answers=0.0, guard=100.0)
    tried: list[dict[str, float]] = []
    for loaded in (there, here):
        problem = SearchProblem(
            load=lambda loaded=loaded: loaded, members=members, limits=loose, effort=SearchEffort(search=2, confirm=4)
        )
        report = optimize(problem)
        tried.append({standing.candidate.name: standing.outcome.effects[0].combined for standing in report.best})
    assert tried[0] == pytest.approx(tried[1], rel=1e-2)
