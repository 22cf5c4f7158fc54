"""Combines several adapters into one ordinary PEFT adapter, exactly or cut to a rank, with all scales folded in (s =
1).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from composer.checks.check import check
from composer.deltas.tensors import torch_device
from composer.deltas.variants.load import NAME_BASE, LoadedAdapter, load_deltas
from composer.errors import NotSupported
from composer.evaluation.calibration import Calibration
from composer.export.peft import PeftAdapter, peft_form, refuse_unheld, write_adapter
from composer.findings import Finding, Severity, refuse_errors
from composer.formats.adapters.provenance import adapter_use, files_of
from composer.formats.adapters.tokenizers import chosen_tokenizer
from composer.formats.checkpoints.card import CARD_FILE, made_card
from composer.formats.checkpoints.checkpoint import Architecture
from composer.formats.checkpoints.hashing import identities
from composer.formats.recipes.methods import AnySettings, parse_settings
from composer.formats.recipes.weights import Weight, weights_of
from composer.methods.combine import FitReport, combine_parsed, participating
from composer.methods.retention import Retention, retention_of
from composer.methods.spectral import Compression, total_loss

_SHARED_FIELDS = ("task_type", "base_model_name_or_path", "revision", "auto_mapping")


@dataclass(frozen=True, slots=True)
class CombineReport:
    """The result. `ranks` counts modules by rank; `compressions` give each module's loss from the cut to a rank."""

    out_dir: str
    modules: int
    ranks: Mapping[int, int]
    replacements: int
    size_bytes: int
    compressions: tuple[Compression, ...]
    findings: tuple[Finding, ...]
    retention: Retention
    fit: FitReport | None = None

    @property
    def lost(self) -> float:
        """|Δ - Δ'| / |Δ| over all compressed modules; 0 if nothing was compressed."""
        return total_loss(self.compressions)

    def to_json(self) -> dict[str, Any]:
        rows = [asdict(compression) | {"relative": compression.relative} for compression in self.compressions]
        fit = {"fit": self.fit.to_json() if self.fit else None}
        kept = {"retention": self.retention.to_json()}
        return asdict(self) | {"compressions": rows, "lost": self.lost} | kept | fit


def combine(  # noqa: PLR0913
    adapters: Sequence[tuple[Path, Weight | float]],
    out_dir: Path,
    architecture: Architecture | None = None,
    method: str = "stack",
    settings: Mapping[str, object] | None = None,
    note: Mapping[str, Any] | None = None,
    calibration: Calibration | None = None,
    device: str = "auto",
    *,
    base_names: Sequence[str] = (),
    strict: bool = False,
) -> CombineReport:
    """Writes the combination of (adapter directory, weight) pairs as one PEFT adapter in float32.

    Its delta is the method's: exact, with a rank up to the sum of the ranks, or cut to the settings' rank or share of
    the energy, with each module's error in the report. Alpha equals the rank (s = 1, no rsLoRA); patterns cover
    differing ranks. If a rank is given, all modules have it, padded with zeros. Without an architecture, adapters are
    matched only by their own module names and shapes. A fitted method is fitted on `calibration`, with one set per
    adapter. Factors are computed on `device` (auto, cpu or cuda:N). The adapters' tokenizer is copied.
    `base_names` are the names of the base. `strict` makes warnings errors, before anything is written.

    Raises NotSupported for a full-space method without a rank, for anything but a sum of expert stacks without an
    architecture, and what a merge raises.
    """
    parsed = parse_settings(method, settings)
    loaded = [load_deltas(path, architecture) for path, _ in adapters]
    together = check(loaded, base_names)
    refuse_errors("These adapters cannot be combined", together, strict=strict)
    tokenizer = chosen_tokenizer(None, [(adapter.name, adapter.path) for adapter in loaded]).files
    inputs = identities([*files_of(path for path, _ in adapters), *tokenizer.values()])
    if architecture is None and not _exact(parsed):
        _refuse_stacks(loaded, method)
    refuse_uncombinable(loaded, [weight for _, weight in adapters], parsed)
    # An adapter does not change the weights, so a tied tensor has two sides here, regardless of how a merge would treat
    # it.
    untied, observe = parsed.with_tied("untie"), calibration.observe if calibration else None
    weights = [weight for _, weight in adapters]
    combined = combine_parsed(loaded, weights, untied, observe, torch_device(device))
    kept = retention_of(loaded, weights, untied, combined)
    little = kept.findings(method, total_loss(combined.compressions))
    findings = (*together, *combined.findings, *_dropped_copies(loaded), *little)
    refuse_errors("This is not combined", findings, strict=strict)
    form = peft_form(combined.deltas, one_rank=parsed.rank is not None)
    made = {**_made(adapters, parsed, calibration), "retention": kept.to_json(), "note": dict(note or {})}
    card = made_card("Adapter", [adapter.name for adapter in loaded], method, kept.words, note or {})
    size = write_adapter(form, out_dir, _fields(loaded, form), made, inputs, {**tokenizer, CARD_FILE: card})
    return CombineReport(
        out_dir=str(out_dir),
        modules=len(form.wrapped),
        ranks=dict(Counter(module.rank for module in form.wrapped)),
        replacements=len(form.replacements),
        size_bytes=size,
        compressions=tuple(combined.compressions),
        findings=findings,
        retention=kept,
        fit=combined.fit,
    )


def _fields(loaded: Sequence[LoadedAdapter], form: PeftAdapter) -> dict[str, Any]:
    """Further fields of the config: what the first adapter has, and shorter targets."""
    fields = {name: loaded[0].config.raw.get(name) for name in _SHARED_FIELDS}
    fields["fan_in_fan_out"] = any(adapter.config.fan_in_fan_out for adapter in loaded)
    return fields | _short_targets(loaded, form)


def _made(
    adapters: Sequence[tuple[Path, Weight | float]], settings: AnySettings, calibration: Calibration | None
) -> dict[str, Any]:
    """Describes the adapter's inputs and its method, for its note."""
    return {
        "made": "combine",
        "adapters": [adapter_use(path, weight).to_json() for path, weight in adapters],
        "method": settings.method,
        "method_version": settings.version,
        "settings": settings.to_json(),
        **({"calibration": calibration.to_json(), "calibration_base": calibration.base} if calibration else {}),
    }


def refuse_uncombinable(
    loaded: Sequence[LoadedAdapter],
    weights: Sequence[Weight | float],
    settings: AnySettings,
) -> None:
    """Raises, before any work, the errors that `combine` would raise in the end: Mismatch for a rule or protected input
    that does
    not exist, NotSupported for a sum that no adapter can hold."""
    cut = settings.pipeline.compress or settings.cuts
    dense = settings.pipeline.space == "full" and not cut
    for adapter in participating(loaded, weights_of(weights), settings):
        refuse_unheld(adapter.deltas, cut=cut, dense=dense)


def _exact(settings: AnySettings) -> bool:
    """Whether the result is a sum, which does not depend on the boundaries between slots."""
    pipeline = settings.pipeline
    steps = (pipeline.space, pipeline.sparsify, pipeline.calibrate, pipeline.parity)
    return steps == ("factors", "none", "none", "") and not settings.alters


def _refuse_stacks(loaded: Sequence[LoadedAdapter], method: str) -> None:
    """Refuses expert stacks without a base: a checkpoint may store an expert's gate and up separately, and then the
    method works on each."""
    for module in (module for adapter in loaded for module in adapter.placed.modules if len(module.pieces) > 1):
        message = f"{module.module} is a stack of experts; {method} works on its parts, which only a base shows."
        raise NotSupported("needs_base", message, subject=module.module, next_step=NAME_BASE)


def _short_targets(loaded: Sequence[LoadedAdapter], form: PeftAdapter) -> dict[str, list[str]]:
    """The adapters' own target names, if their union covers exactly the written modules; empty otherwise.

    Servers and people prefer short names. They are only correct if no adapter selected layers in another way: a module
    wrapped without tensors would load as an untrained pair. They do not cover a head that weight tying wrapped with the
    embedding.
    """
    chosen = ("exclude_modules", "layers_to_transform", "layers_pattern")
    short: dict[str, list[str]] = {}
    placed = [module for adapter in loaded for module in adapter.placed.low_rank if not module.nested]
    modules = [adapter.config.target_modules for adapter in loaded]
    if all(isinstance(names, tuple) for names in modules) and not any(
        adapter.config.raw.get(field) for adapter in loaded for field in chosen
    ):
        names = {name for own in modules for name in own or ()}
        short |= _if_they_cover("target_modules", names, form.modules, {module.module for module in placed})
    stacks = [module.module for adapter in loaded for module in adapter.placed.modules if module.kind == "experts"]
    names = {name for adapter in loaded for name in adapter.config.target_parameters}
    return short | _if_they_cover("target_parameters", names, form.parameters, set(stacks))


def _if_they_cover(field: str, names: set[str], paths: Sequence[str], touched: set[str]) -> dict[str, list[str]]:
    covered = all(any(f".{path}".endswith(f".{name}") for name in names) for path in paths)
    return {field: sorted(names)} if names and covered and touched <= set(paths) else {}


def _dropped_copies(loaded: Sequence[LoadedAdapter]) -> list[Finding]:
    message = "The adapter's copy of this base weight was left out, unchecked: combining does not read the base."
    return [
        Finding("base_copy_dropped", Severity.NOTICE, name, message)
        for adapter in loaded
        for name in adapter.base_copies
    ]
