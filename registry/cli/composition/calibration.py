"""Calibration examples for the fitted methods of `combine`, `merge` and `conflicts`."""

import json
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from composer.formats.untrusted import read_text
from registry.cli.console import render
from registry.errors import Conflict, Usage
from registry.sdk.conflicts import calibration_of

if TYPE_CHECKING:
    from composer.evaluation.calibration import Calibration
    from composer.findings import Finding
    from composer.formats.recipes.weights import Weight
    from composer.merge.proof import ProofPrompt
    from composer.methods.regmean import FitReport

Suites = Annotated[
    list[Path] | None,
    typer.Option(
        "--suite",
        metavar="FILE",
        help="For regmean: each adapter's suite, in the order of the adapters. For merge --prove: any suites.",
    ),
]
Prompts = Annotated[
    list[Path] | None,
    typer.Option(
        "--prompts",
        metavar="FILE",
        help="For regmean: each adapter's prompts, one per line, instead of suites. For merge --prove: any prompts.",
    ),
]
Guards = Annotated[
    list[Path] | None,
    typer.Option(
        "--guard", metavar="FILE", help="For regmean: a suite on which the result should answer as the base does."
    ),
]

MAX_NOTE_BYTES = 64 << 20


@dataclass(frozen=True)
class ExampleFiles:
    """The files that --suite, --prompts and --guard name. `for_proof`: a merge is compared on them."""

    suites: Sequence[Path] | None
    prompts: Sequence[Path] | None
    guards: Sequence[Path] | None
    for_proof: bool = False

    def asked(self) -> list[tuple[str, ...]]:
        """The prompts of each file that --prompts names."""
        from composer.conflicts.examine import parse_prompts
        from composer.formats.recipes.suite import MAX_FILE_BYTES

        return [tuple(parse_prompts(read_text(path, MAX_FILE_BYTES), str(path))) for path in self.prompts or []]


def local_calibration(
    method: str, settings: dict[str, object], base: Path | None, files: ExampleFiles, device: str
) -> "Calibration | None":
    """The calibration that the options of `combine` and `merge` describe. Raises Usage for these options with a method
    that is not fitted, for both suites and prompts, and for a fitted method without a base or without either."""
    from composer.formats.recipes.methods import parse_settings

    parsed = parse_settings(method, settings)
    if not parsed.pipeline.fitted:
        if files.guards or ((files.suites or files.prompts) and not files.for_proof):
            message = f"--suite, --prompts and --guard have no effect: {method} is not fitted on examples."
            raise Usage("idle_option", message, subject="--suite", next_step="Leave them out, or add --method regmean.")
        return None
    if base is None or bool(files.suites) == bool(files.prompts):
        message = f"{method} is fitted on examples: it needs --base, and --suite or --prompts for each adapter."
        raise Usage("needs_examples", message, subject="--suite", next_step="Write --suite FILE once for each adapter.")
    from composer.evaluation.model import load_model
    from composer.formats.recipes.suite import check_guard, parse_suite

    asked = files.asked()
    own, guards = (list(map(parse_suite, paths or [])) for paths in (files.suites, files.guards))
    for suite in guards:
        check_guard(suite.name, suite.kind, suite.count)
    calibration = calibration_of(parsed, lambda: load_model(base, device), own, asked, guards)
    return calibration and replace(calibration, base=digest_of_base(base))


def prompts_of_proof(files: ExampleFiles, base: Path) -> "list[ProofPrompt]":
    """The prompts that a merge proves itself on; none without --prove. Prompts of --prompts are chats if the base has a
    chat template. Raises Usage for --prove without any."""
    from composer.formats.adapters.tokenizers import read_tokenizer
    from composer.formats.recipes.suite import parse_suite
    from composer.merge.proof import ProofPrompt, proof_prompts

    if not files.for_proof:
        return []
    if not files.suites and not files.prompts:
        raise Usage("needs_prompts", "--prove compares answers to prompts, and there are none.", subject="--prove")
    chat = bool(read_tokenizer(base).template)
    plain = [ProofPrompt(prompt, chat=chat) for prompts in files.asked() for prompt in prompts]
    return [*proof_prompts([parse_suite(path) for path in files.suites or []]), *plain]


def digest_of_base(base: Path) -> str:
    """The digest of the base's weights, which a fit depends on."""
    from composer.formats.checkpoints.checkpoint import open_checkpoint
    from composer.formats.checkpoints.hashing import hash_checkpoint

    checkpoint = open_checkpoint(base)
    size_bytes = sum(spec.size_bytes for spec in checkpoint.architecture.tensors.values())
    with render.progress(f"hash {base.name}", size_bytes) as done:
        return hash_checkpoint(checkpoint, done).weights_digest


@contextmanager
def fitting(calibration: "Calibration | None") -> "Generator[Calibration | None]":
    """The calibration with a progress bar: each step runs every example once."""
    if calibration is None:
        yield None
        return
    with render.progress("fit", calibration.settings.steps * calibration.examples, "examples") as bar:
        yield replace(calibration, progress=bar)


def contradictions(calibration: "Calibration | None", names: Sequence[str]) -> "list[Finding]":
    """Findings for adapters whose suites have the same prompts but different answers: no fit serves both."""
    from composer.conflicts.findings import of_contradictions
    from composer.formats.recipes.policy import Policy
    from composer.formats.recipes.suite import contradicting_suites

    if calibration is None:
        return []
    suites = {
        name: calibration_set.suite
        for name, calibration_set in zip(names, calibration.sets, strict=True)
        if calibration_set.suite
    }
    return of_contradictions(contradicting_suites(suites), Policy())


def refuse_uneven(calibration: "Calibration | None", adapters: Sequence[object]) -> None:
    if calibration is not None and len(calibration.sets) != len(adapters):
        message = f"{len(calibration.sets)} suites or prompt files were given for {len(adapters)} adapters."
        raise Usage("suites_uneven", message, subject="--suite")


def fit_lines(fit: "FitReport | None", names: Sequence[str]) -> list[tuple[str, str]]:
    """A fit's results as lines of text: each adapter's error on the inputs that it was fitted on."""
    if fit is None:
        return []
    errors = zip(names, fit.errors, fit.errors_of_sum, strict=False)
    rows = [(f"error {name}", f"{error:.3f} (weighted sum: {plain:.3f})") for name, error, plain in errors]
    if fit.guard is not None:
        rows.append(("change on the guard", f"{fit.guard:.3f} (weighted sum: {fit.guard_of_sum:.3f})"))
    kept = [("at the weighted sum", ", ".join(fit.kept_at_sum))] if fit.kept_at_sum else []
    return [("fitted modules", str(fit.fitted)), *rows, *kept]


def fitted_adapter(  # noqa: PLR0913
    base: Path,
    adapters: "list[tuple[Path, Weight]]",
    output: Path,
    how: tuple[str, dict[str, object]],
    calibration: "Calibration",
    device: str,
    *,
    strict: bool = False,
) -> Path:
    """The adapter that a merge with a fitted method adds: `OUTPUT-adapter`, fitted now or by an earlier run of the same
    command. Raises Conflict if something else has that name, such as a fit on another base."""
    from composer.checks.bases import names_of
    from composer.export.combine import combine
    from composer.formats.adapters.provenance import adapter_use
    from composer.formats.checkpoints.checkpoint import open_checkpoint
    from composer.formats.checkpoints.staging import NOTE_FILE
    from composer.formats.recipes.methods import parse_settings

    directory = output.with_name(f"{output.name}-adapter")
    if not directory.is_dir():
        checkpoint = open_checkpoint(base)
        with fitting(calibration) as counted:
            report = combine(
                adapters, directory, checkpoint.architecture, *how, calibration=counted, device=device,
                base_names=names_of(checkpoint.path, checkpoint.config), strict=strict,
            )  # fmt: skip
        render.warn_of(report.findings)
        for name, value in fit_lines(report.fit, [path.name for path, _ in adapters]):
            render.say(f"{name}: {value}")
        return directory
    parsed = parse_settings(*how)
    wanted: dict[str, tuple[str, Any]] = {
        "adapters": ("adapters", [adapter_use(path, weight).to_json() for path, weight in adapters]),
        "method": ("method", how[0]),
        "method_version": ("version of the method", parsed.version),
        "settings": ("settings", parsed.to_json()),
        "calibration": ("examples", calibration.to_json()),
        "calibration_base": ("base", calibration.base),
    }
    note = json.loads(read_text(directory / NOTE_FILE, MAX_NOTE_BYTES))
    others = [word for name, (word, value) in wanted.items() if note.get(name) != json.loads(json.dumps(value))]
    if others:
        message = f"{directory} exists, and is not what this command fits: it is of another {', '.join(others)}."
        raise Conflict("output_exists", message, subject=str(directory))
    return directory
