"""The fit of an adapter by a fitted method, as one unit: it loads the base, and its result is the adapter's files."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from composer.formats.recipes.calibration_sets import CalibrationSet
from composer.formats.recipes.methods import Regmean, parse_settings
from composer.formats.recipes.suite import Suite
from composer.formats.recipes.weights import parse_weight
from registry.formats.manifest import ManifestFile
from registry.worker.composition import CompositionRun, register_files
from registry.worker.engine.units import Count, Node, Result, Task, Unit
from registry.worker.node_files import Row, are_stored, from_rows, member_directory, store_directory, to_rows
from registry.worker.node_models import base_checkpoint, base_hints, loaded_base, needs_of_model
from registry.worker.runner import JobRun

if TYPE_CHECKING:
    from composer.evaluation.calibration import Calibration
    from composer.evaluation.model import LoadedModel
    from composer.formats.recipes.methods import AnySettings


def fitted_adapter(held: JobRun, work: CompositionRun) -> list[ManifestFile]:
    """The files of the composition's adapter, which are in the store. Raises what the unit raises."""
    lock, hints = work.lock, base_hints(work.locations, work.base_bytes)
    members = [
        {"name": locked.commit, "weight": locked.weighted.to_json(), "files": to_rows(files)}
        for locked, files in zip(lock.inputs, work.files, strict=True)
    ]
    content = {
        "base": lock.base,
        "method": lock.method,
        "method_version": work.settings.pipeline.version,
        "settings": lock.settings,
        "members": members,
        "note": work.note,
        "calibration": calibration_rows(work.calibration_sets(held)),
    }
    unit = Unit(name="fit", content=content, hints=hints)
    ((_, result),) = held.engine.map(FIT, [unit], needs_of_model(lock.base, hints), held.check)
    files = from_rows(result["files"])
    register_files(held, work.outputs[0].target, files)
    return files


def calibration_rows(sets: Sequence[CalibrationSet]) -> list[Row]:
    """Calibration sets as units name them."""
    return [
        {"suite": one.suite.to_json() if one.suite else None, "count": one.count, "prompts": list(one.prompts)}
        for one in sets
    ]


def calibration_of(
    load: "Callable[[], LoadedModel]", base: str, rows: Sequence[Row] | None, settings: "AnySettings"
) -> "Calibration | None":
    """The calibration on the base of this digest and the sets of `calibration_rows`; None for a method that is not
    fitted."""
    from composer.evaluation.calibration import Calibration

    if rows is None or not isinstance(settings, Regmean):
        return None
    sets = [
        CalibrationSet(Suite.from_json(row["suite"]) if row["suite"] else None, row["count"], tuple(row["prompts"]))
        for row in rows
    ]
    return Calibration(load, sets, settings, base=base)


def _fit(node: Node, unit: Unit, _count: Count) -> Result:
    from composer.export.combine import combine

    content, hints = unit.content, unit.hints
    architecture = base_checkpoint(node, content["base"], hints).architecture
    calibration = calibration_of(
        lambda: loaded_base(node, content["base"], hints),
        content["base"],
        content["calibration"],
        parse_settings(content["method"], content["settings"]),
    )
    with node.scratch() as directory:
        made = directory / "adapter"
        members = [(member_directory(node, directory, one), parse_weight(one["weight"])) for one in content["members"]]
        how: tuple[Any, ...] = (content["method"], content["settings"], content["note"], calibration)
        combine(members, made, architecture, *how)
        return {"files": to_rows(store_directory(node, made))}


def _is_stored(node: Node, result: Result) -> bool:
    return are_stored(node, from_rows(result["files"]))


FIT = Task(name="fit", version=1, run=_fit, intact=_is_stored)
