"""The strongest possible evidence, and the document that reports it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import torch

from composer.conflicts.examine import Evidence, examine
from composer.conflicts.render.text import document, summary
from composer.conflicts.report import SCHEMA, conflicts
from composer.deltas.delta import Layout, LowRank
from composer.deltas.variants.load import LoadedAdapter, load_deltas
from composer.evaluation.model import LoadedModel
from composer.findings import Verdict
from composer.formats.checkpoints.checkpoint import open_checkpoint
from composer.formats.recipes.methods import parse_settings
from composer.formats.recipes.policy import parse_policy
from composer.formats.recipes.suite import Example, Suite
from composer.methods.retention import too_large
from tests.composer.small_model import Load, save_adapter

DOCUMENTED = Path(__file__).with_name("conflicts.schema.json")


@pytest.fixture(scope="module")
def adapters(load: Load) -> list[LoadedAdapter]:
    return [load(name, seed) for seed, name in enumerate(("red", "green", "blue"), start=1)]


def suites(count: int) -> list[Suite]:
    names = ("red", "green", "blue")[:count]
    return [
        Suite(name=name, kind="target", chat=True, examples=(Example(f"hi {name}", name), Example("you", "you")))
        for name in names
    ]


def guard() -> Suite:
    return Suite(name="general", kind="guard", chat=True, examples=(Example("who", "me"), Example("what", "that")))


def never() -> LoadedModel:
    raise AssertionError("the base was loaded, and nothing needed it")


def test_a_suite_for_each_is_a_probe_prompts_are_activations_and_nothing_is_weights(
    adapters: list[LoadedAdapter], loaded: LoadedModel
) -> None:
    def kinds(evidence: Evidence | None) -> set[str]:
        return {pair.evidence for pair in examine(adapters, [1.0] * 3, evidence=evidence).pairs}

    assert kinds(Evidence(load=lambda: loaded, suites=suites(3), k=1, prompts=["hi"])) == {"probe"}
    assert kinds(Evidence(load=lambda: loaded, suites=[*suites(2), None], k=1, prompts=["hi"])) == {"activations"}
    assert kinds(Evidence(load=never, suites=[*suites(2), None], k=1)) == {"weights"}
    assert kinds(Evidence(load=never, suites=suites(3))) == {"weights"}
    assert kinds(None) == {"weights"}


def test_the_evidence_that_is_weak_is_said_to_be(adapters: list[LoadedAdapter], loaded: LoadedModel) -> None:
    said = {
        kind: [finding.message for finding in examine(adapters, [1.0] * 3, evidence=evidence).findings]
        for kind, evidence in (
            ("weights", None), ("activations", Evidence(load=lambda: loaded, prompts=["hi"])),
            ("probe", Evidence(load=lambda: loaded, suites=suites(3), k=2)),
        )
    }  # fmt: skip
    assert any("weights alone hardly predict" in text for text in said["weights"])
    assert any(
        "weaker evidence than a probe: on the members' own examples, with completions," in text
        for text in said["activations"]
    )
    assert not any("evidence" in text for text in said["probe"])


def test_without_a_probe_a_set_is_unmeasured_and_two_examples_leave_it_undecided(
    adapters: list[LoadedAdapter], loaded: LoadedModel
) -> None:
    def verdict(evidence: Evidence | None) -> Verdict:
        lenient = parse_policy("thresholds: {probe_loss: 1000}\nprobe_answers: ignore\n")
        return examine(adapters, [1.0] * 3, evidence=evidence, policy=lenient).verdict

    assert verdict(None) is verdict(Evidence(load=lambda: loaded, prompts=["hi"])) is Verdict.UNMEASURED
    assert verdict(Evidence(load=never, suites=suites(3))) is Verdict.UNMEASURED
    assert verdict(Evidence(load=lambda: loaded, suites=suites(3), k=2, most=24)) is Verdict.UNDECIDED, (
        "the suites have no more"
    )
    assert verdict(Evidence(load=lambda: loaded, suites=larger(suites(3)), k=8, most=24)) is Verdict.OK


def larger(small: list[Suite]) -> list[Suite]:
    more = tuple(Example(f"prompt {number}", "yes") for number in range(8))
    return [Suite(name=suite.name, kind=suite.kind, chat=True, examples=(*suite.examples, *more)) for suite in small]


def test_members_that_answer_the_same_prompts_differently_are_named_before_anything_else(
    adapters: list[LoadedAdapter],
) -> None:
    own = suites(3)
    asked_alike = (Example("hi red", "something else"), Example("you", "you"))
    own[2] = Suite(name=own[2].name, kind="target", chat=True, examples=asked_alike)
    report = examine(adapters, [1.0] * 3, evidence=Evidence(load=never, suites=own))
    assert report.findings[0].code == "same_prompts"
    assert report.findings[0].subject == "red + blue"
    assert "no single model serves both" in report.findings[0].message
    verdicts = {(pair.a, pair.b): pair.verdict for pair in report.pairs}
    assert verdicts == {("red", "green"): "unmeasured", ("red", "blue"): "warn", ("green", "blue"): "unmeasured"}
    assert report.verdict is Verdict.WARN
    headline = summary(report)
    assert "require different answers to 1 of them: no single model serves both" in headline.lines[0]
    assert headline.fix.startswith("Serve them separately and name")
    ignored = examine(
        adapters, [1.0] * 3, evidence=Evidence(load=never, suites=own), policy=parse_policy("same_prompts: ignore")
    )
    assert (ignored.verdict, summary(ignored).fix[:10]) == (Verdict.UNMEASURED, "Measure it")


@pytest.mark.parametrize("method", ["ties", "knots_ties", "mean", "core_tsv", "dare_ties"])
def test_a_method_is_probed_as_what_it_makes(adapters: list[LoadedAdapter], loaded: LoadedModel, method: str) -> None:
    def measured(name: str) -> list[float]:
        report = examine(
            adapters, [1.0] * 3, parse_settings(name), evidence=Evidence(load=lambda: loaded, suites=suites(3), k=2)
        )
        assert report.probe is not None
        return [
            effect.combined for outcome in (*report.probe.pairs, report.probe.overall) for effect in outcome.effects
        ]

    assert all(
        one != pytest.approx(other, abs=1e-4) for one, other in zip(measured(method), measured("stack"), strict=True)
    )


def test_a_protected_member_is_protected_in_its_pairs_and_in_the_whole(
    adapters: list[LoadedAdapter], loaded: LoadedModel
) -> None:
    how = parse_settings("stack", {"protect": [2]})
    report = examine(adapters, [1.0] * 3, how, evidence=Evidence(load=lambda: loaded, suites=suites(3), k=2))
    plain = examine(adapters, [1.0] * 3, evidence=Evidence(load=lambda: loaded, suites=suites(3), k=2))
    assert report.probe is not None
    assert plain.probe is not None
    changed = [
        one.effects[0].combined != pytest.approx(other.effects[0].combined, abs=1e-5)
        for one, other in zip(report.probe.pairs, plain.probe.pairs, strict=True)
    ]
    assert changed == [True, False, True], "red and blue are a pair without the protected one"
    assert report.members[1].retention == pytest.approx(1.0, abs=1e-4)


def test_what_cannot_be_combined_is_not_measured(base: Path, loaded: LoadedModel, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    saved: list[LoadedAdapter] = []
    for seed, name in ((1, "one"), (2, "two")):
        model = AutoModelForCausalLM.from_pretrained(base)
        save_adapter(model, tmp_path / name, seed, r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
        saved.append(load_deltas(tmp_path / name, loaded.architecture))
    report = examine(saved, [1.0, 1.0], evidence=Evidence(load=never, suites=suites(2), k=2))
    assert report.verdict == "refuse"
    as_deltas = parse_settings("stack", {"replacements": "delta"})
    measured = examine(saved, [1.0, 1.0], as_deltas, evidence=Evidence(load=lambda: loaded, suites=suites(2), k=2))
    assert measured.verdict != "refuse"
    assert measured.pairs[0].evidence == "probe"


def test_every_report_is_what_the_documented_schema_says(
    adapters: list[LoadedAdapter], loaded: LoadedModel, base: Path
) -> None:
    """An additional or missing key, or another type, is a change of the contract: `SCHEMA` counts them."""
    schema = json.loads(DOCUMENTED.read_text())
    validator = jsonschema_rs.validator_for(schema)
    assert schema["properties"]["schema"] == {"const": SCHEMA}
    evidences: list[Callable[[], Evidence | None]] = [
        lambda: None,
        lambda: Evidence(load=lambda: loaded, prompts=["hi"]),
        lambda: Evidence(load=lambda: loaded, suites=suites(3), guards=[guard()], k=2),
        lambda: Evidence(load=lambda: loaded, suites=suites(3), k=1),
    ]
    for made in evidences:
        for checkpoint in (None, open_checkpoint(base)):
            report = examine(adapters, [1.0] * 3, parse_settings("ties"), evidence=made(), base=checkpoint)
            written = json.loads(json.dumps(document(report), allow_nan=False))
            errors = [f"{list(error.instance_path)}: {error.message}" for error in validator.iter_errors(written)]
            assert errors == []
    assert_strict(schema)


def assert_strict(schema: Any) -> None:
    """Every object of the schema names all of its keys and requires them."""
    if isinstance(schema, dict):
        if schema.get("type") == "object" and "properties" in schema:
            assert schema["additionalProperties"] is False
            assert sorted(schema["required"]) == sorted(schema["properties"])
        for value in schema.values():
            assert_strict(value)
    elif isinstance(schema, list):
        for value in schema:
            assert_strict(value)


def test_a_policy_reaches_the_probe_and_the_findings(adapters: list[LoadedAdapter], loaded: LoadedModel) -> None:
    policy = parse_policy("{probe_loss: error, thresholds: {probe_loss: -1000}}")
    report = examine(
        adapters[:2], [1.0, 1.0], evidence=Evidence(load=lambda: loaded, suites=suites(2), k=2, most=2), policy=policy
    )
    assert report.probe is not None
    sure = [effect for effect in report.probe.overall.effects if effect.loss_interval.low > -1000]
    assert len([finding for finding in report.findings if finding.code == "probe_loss"]) == len(sure) > 0
    assert report.verdict == "refuse"


def test_dense_deltas_are_counted_before_they_are_made(adapters: list[LoadedAdapter]) -> None:
    module = "model.layers.0.self_attn.q_proj"
    huge = LowRank(
        module=module,
        weight=f"{module}.weight",
        layout=Layout.LINEAR,
        A=torch.ones(1, 1 << 15),
        B=torch.ones(1 << 15, 1),
        scale=1.0,
    )
    large = [replace(adapter, deltas=(huge,)) for adapter in adapters[:2]]
    assert too_large(large)
    assert not too_large(adapters)
    for method in ("ties", "ties_svd", "peft_svd"):
        assert [member.retention for member in conflicts(large, [1.0, 1.0], parse_settings(method)).members] == [
            None,
            None,
        ]
    assert conflicts(large, [1.0, 1.0], parse_settings("knots_ties")).members[0].retention is not None
