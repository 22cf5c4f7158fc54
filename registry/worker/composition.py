"""The view of a composition that its steps share. Each step reads it anew, so a crashed job can resume at any step."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from composer.formats.checkpoints.checkpoint import Architecture
from composer.formats.recipes.lock import Lock
from composer.formats.recipes.methods import AnySettings, parse_settings
from composer.formats.recipes.recipe import Recipe, parse_recipe
from composer.formats.recipes.suite import CalibrationSet, Suite
from registry.database.tables import Base
from registry.domain.access.audit import Actor
from registry.domain.catalog import bases, suites
from registry.domain.catalog.repositories import Kind
from registry.domain.compositions import compositions, locking
from registry.domain.jobs.queue import Amount
from registry.formats.manifest import ManifestFile
from registry.formats.references import parse_reference
from registry.transfer import publishing, uploads
from registry.worker.host import work_of
from registry.worker.runner import JobRun

_NAMELESS = ("commit", "weight", "rules")
"""The fields of an input that do not identify it. Everyone may see them."""
_NAMING = ("inputs", "adapter", "model", "set")
_UNNOTED = ("digest", "optimized")


@dataclass(frozen=True, slots=True)
class Output:
    """An output to publish; `target` is REPO:VERSION."""

    target: str
    kind: Kind


@dataclass(frozen=True, slots=True)
class CompositionRun:
    """Everything that a step needs to know about its composition."""

    composition_id: int
    recipe: Recipe
    lock: Lock
    architecture: Architecture
    locations: list[str]
    input_ids: list[int]
    files: list[list[ManifestFile]]
    member_suites: list[str | None]
    directory: Path

    @property
    def settings(self) -> AnySettings:
        return parse_settings(self.lock.method, self.lock.settings)

    @property
    def names(self) -> list[str]:
        """The inputs as REPO:VERSION."""
        return [f"{locked.repository}:{locked.version}" for locked in self.lock.inputs]

    @property
    def phrases(self) -> dict[str, str]:
        """The phrase that selects each input in the result, by the name of its suite; empty without phrases."""
        return {row["suite"]: row["phrase"] for row in self.lock.calibration if "phrase" in row}

    @property
    def accepted(self) -> str:
        """The reason why the search's choice was taken although it breaks a limit; empty if it breaks none."""
        return str((self.lock.optimized or {}).get("accepted", ""))

    @property
    def results_file(self) -> Path:
        """The file of the candidate's per-example results by suite digest, for suites measured on all examples."""
        return self.directory / "results.json"

    @property
    def note(self) -> dict[str, Any]:
        """The lineage that every output's adaptory.json records.

        It names inputs by commit, not by release: readers of an output need not be allowed to read its inputs or other
        outputs. It omits the lock's digest, which would let readers guess names, and the measurements of a search.
        """
        recipe, lock = self.recipe.to_json(), self.lock.to_json()
        inputs = [{name: value for name, value in row.items() if name in _NAMELESS} for row in lock["inputs"]]
        return {
            "recipe": {name: value for name, value in recipe.items() if name not in _NAMING},
            "lock": {name: value for name, value in lock.items() if name not in _UNNOTED} | {"inputs": inputs},
            **({"phrases": self.phrases} if self.phrases else {}),
            **({"accepted": self.accepted} if self.accepted else {}),
        }

    @property
    def outputs(self) -> list[Output]:
        """The adapter, the model or both, as the recipe publishes them, or the set."""
        made = ((self.recipe.adapter, Kind.ADAPTER), (self.recipe.model, Kind.MODEL))
        if self.lock.is_set:
            made = ((self.recipe.adapter_set, Kind.SET),)
        return [Output(target, kind) for target, kind in made if target]

    @property
    def measured_output(self) -> str | None:
        """The output that the evaluation measures in memory, the adapter or the set; None for a model alone."""
        return self.recipe.adapter_set if self.lock.is_set else self.recipe.adapter

    @property
    def evaluated(self) -> list[str]:
        """The recipe's suites and those that the lock's gates use; with `gates: []`, also those of the inputs."""
        return locking.evaluated(self.recipe, self.lock, self.member_suites)

    @property
    def has_gates(self) -> bool:
        return self.recipe.gates is None or bool(self.recipe.gates)

    @property
    def rules(self) -> dict[str, bool]:
        """Maps each gate to whether it is required. If the recipe has none (`[]`), the comparison with the inputs only
        warns."""
        required = dict.fromkeys((*(self.recipe.gates or ()), *self.lock.gates), True)
        if self.has_gates:
            return required
        return dict.fromkeys(locking.gates_against_inputs(self.member_suites), False)

    def calibration_sets(self, held: JobRun) -> list[CalibrationSet]:
        """The examples that the lock chose to fit each input on, in order, and those of the guards."""
        sets: list[CalibrationSet] = []
        for index, row in enumerate(self.lock.calibration):
            if "suite_digest" in row:
                (content,) = suites_named(held, [row["suite_digest"]])
                phrase, reworded = row.get("phrase", ""), row.get("reworded", False)
                sets.append(CalibrationSet(content, len(row["examples"]), phrase=phrase, reworded=reworded))
            else:
                sets.append(CalibrationSet(prompts=self.recipe.inputs[index].prompts))
        return sets

    def searched(self, held: JobRun) -> list[CalibrationSet]:
        """The examples that a search saw. They are excluded from evaluation."""
        rows = (self.lock.optimized or {}).get("searched", [])
        contents = suites_named(held, [row["suite_digest"] for row in rows])
        return [CalibrationSet(content, len(row["examples"])) for content, row in zip(contents, rows, strict=True)]

    @property
    def base_bytes(self) -> int:
        """The size of the base's tensors."""
        return sum(spec.size_bytes for spec in self.architecture.tensors.values())


def register_files(held: JobRun, target: str, files: Sequence[ManifestFile]) -> None:
    """Registers the blobs that units stored for the release `target`, with the creator's current roles."""
    with held.resources.read() as session:
        actor = creator(held, session)
    uploads.register_stored(held.resources, actor, parse_reference(target).repository.namespace, files)


def composition_of(held: JobRun) -> CompositionRun:
    with held.resources.read() as session:
        composition = compositions.find_by_job(session, held.job_id)
        recipe, lock = parse_recipe(composition.recipe), Lock.from_json(composition.lock)
        inputs = compositions.inputs_of(session, lock)
        return CompositionRun(
            composition_id=composition.id,
            recipe=recipe,
            lock=lock,
            architecture=bases.architecture(session, lock.base),
            locations=bases.locations(session, session.get_one(Base, lock.base))[lock.base],
            input_ids=[release.id for release in inputs],
            files=[publishing.manifest_files(session, release) for release in inputs],
            member_suites=locking.member_suites(session, recipe, inputs),
            directory=work_of(held.resources, composition.id),
        )


def creator(held: JobRun, session: Session) -> Actor:
    """The composition's creator, with their current roles."""
    return compositions.creator(session, compositions.find_by_job(session, held.job_id), held.resources.clock())


def suites_named(held: JobRun, names: Sequence[str]) -> list[Suite]:
    """Reads the current contents of the suites."""
    with held.resources.read() as session:
        return [Suite.from_json(suites.find(session, name).content) for name in names]


def store(held: JobRun, work: CompositionRun, **columns: Any) -> None:
    """Writes columns of the composition's row."""
    with held.resources.write() as session:
        composition, _ = compositions.find(session, work.composition_id)
        for name, value in columns.items():
            setattr(composition, name, value)


class ProgressCount:
    """Counts finished bytes or examples and records them as the job's progress. Safe to call from several threads."""

    def __init__(self, held: JobRun, unit: str, total: int = 0) -> None:
        self._held, self._unit, self._total, self._done = held, unit, total, 0
        self._lock = threading.Lock()

    @property
    def done(self) -> int:
        """The count so far."""
        return self._done

    def __call__(self, count: int) -> None:
        with self._lock:
            self._done += count
            if self._total:  # a search may measure more than it was expected to
                self._total = max(self._total, self._done)
            self._write()

    def reached(self, done: int) -> None:
        """Raises the count to at least `done`, whichever process did the work."""
        with self._lock:
            self._done = max(self._done, done)
            if self._total:
                self._total = max(self._total, self._done)
            self._write()

    def expect(self, total: int) -> None:
        """Sets the total, at the start or when it grows."""
        with self._lock:
            self._total = total
            self._write()

    def _write(self) -> None:
        self._held.progress(Amount(self._done, self._total, self._unit, self._held.engine.redone))
