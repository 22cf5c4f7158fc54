"""Combines a composition's adapter in one unit, which returns the adapter's files. A fitted method loads the base."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict, cast

from composer.formats.recipes.methods import Regmean, parse_settings
from composer.formats.recipes.suite import CalibrationSet, Suite
from composer.formats.recipes.weights import parse_weight
from registry.formats.manifest import ManifestFile
from registry.worker.composition import CompositionRun
from registry.worker.engine.units import BaseHints, Count, Node, Task, Unit
from registry.worker.node_files import (
    FilesRow,
    MemberRow,
    fetched,
    files_are_stored,
    from_rows,
    share_architecture,
    shared_architecture,
    store_directory,
    to_rows,
)
from registry.worker.node_models import WITHOUT_MODEL, base_hints, loaded_base, needs_of_model
from registry.worker.runner import JobRun

if TYPE_CHECKING:
    from composer.evaluation.calibration import Calibration
    from composer.evaluation.model import LoadedModel
    from composer.formats.recipes.methods import AnySettings


class CalibrationRow(TypedDict):
    """A `CalibrationSet` as JSON."""

    suite: Mapping[str, Any] | None
    count: int
    prompts: list[str]
    phrase: NotRequired[str]
    reworded: NotRequired[bool]


class CombineContent(TypedDict):
    """Everything that determines the bytes of a combined adapter; `architecture` is the key of a shared document."""

    base: str
    architecture: str
    method: str
    method_version: int
    settings: Mapping[str, Any]
    members: list[MemberRow]
    note: Mapping[str, Any]
    calibration: list[CalibrationRow] | None


def combined_adapter(held: JobRun, work: CompositionRun) -> list[ManifestFile]:
    """Returns the stored files of the composition's adapter. The first call makes them, later calls reuse them. Raises
    what the unit raises."""
    lock, hints = work.lock, base_hints(work.locations, work.base_bytes)
    content: CombineContent = {
        "base": lock.base,
        "architecture": share_architecture(held.engine.node, work.architecture),
        "method": lock.method,
        "method_version": work.settings.version,
        "settings": lock.settings,
        "members": member_rows(work),
        "note": work.note,
        "calibration": calibration_rows(work.calibration_sets(held)) if work.settings.pipeline.fitted else None,
    }
    needs = needs_of_model(lock.base, hints) if work.settings.pipeline.fitted else WITHOUT_MODEL
    ((_, result),) = held.engine.map(COMBINE, [Unit(name="combine", content=content, hints=hints)], needs, held.check)
    files = from_rows(result["files"])
    held.made.update(file.sha256 for file in files)
    return files


def member_rows(work: CompositionRun) -> list[MemberRow]:
    """Lists the inputs for units: commit, weight and files."""
    return [
        {"name": locked.commit, "weight": locked.weighted.to_json(), "files": to_rows(files)}
        for locked, files in zip(work.lock.inputs, work.files, strict=True)
    ]


def calibration_rows(sets: Sequence[CalibrationSet]) -> list[CalibrationRow]:
    """Serializes calibration sets for units."""
    rows: list[CalibrationRow] = []
    for fitted_on in sets:
        suite = fitted_on.suite.to_json() if fitted_on.suite else None
        rows.append({"suite": suite, "count": fitted_on.count, "prompts": list(fitted_on.prompts)})
        if fitted_on.phrase:
            rows[-1]["phrase"] = fitted_on.phrase
        if fitted_on.reworded:
            rows[-1]["reworded"] = True
    return rows


def calibration_sets(rows: Sequence[CalibrationRow]) -> list[CalibrationSet]:
    """Reverses `calibration_rows`."""
    return [
        CalibrationSet(
            Suite.from_json(row["suite"]) if row["suite"] else None,
            row["count"],
            tuple(row["prompts"]),
            row.get("phrase", ""),
            row.get("reworded", False),
        )
        for row in rows
    ]


def calibration_of(
    load: "Callable[[], LoadedModel]",
    base: str,
    rows: Sequence[CalibrationRow] | None,
    settings: "AnySettings",
    members: int,
) -> "Calibration | None":
    """Builds the calibration from the base with this digest and the sets in `calibration_rows`, those of the members
    and then those of the guards; None for a method that is not fitted."""
    from composer.evaluation.calibration import Calibration

    if rows is None or not isinstance(settings, Regmean):
        return None
    sets = calibration_sets(rows)
    return Calibration(load, sets[:members], settings, base=base, guards=sets[members:])


def _combine(node: Node, unit: Unit, _count: Count) -> FilesRow:
    from composer.export.combine import combine

    content, hints = cast(CombineContent, unit.content), cast(BaseHints, unit.hints)
    calibration = calibration_of(
        lambda: loaded_base(node, content["base"], hints),
        content["base"],
        content["calibration"],
        parse_settings(content["method"], content["settings"]),
        len(content["members"]),
    )
    members = [(fetched(node, row["files"], row["name"]), parse_weight(row["weight"])) for row in content["members"]]
    architecture = shared_architecture(node, content["architecture"])
    with node.scratch() as directory:
        made = directory / "adapter"
        how: tuple[Any, ...] = (content["method"], content["settings"], content["note"], calibration)
        combine(members, made, architecture, *how)
        return {"files": to_rows(store_directory(node, made))}


COMBINE = Task(name="combine", version=2, run=_combine, intact=files_are_stored)
