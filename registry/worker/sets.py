"""Sets of adapters: the files of one that a composition makes, and the members of one that is evaluated."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from composer.formats.checkpoints.card import CARD_FILE
from composer.formats.recipes.suite import CalibrationSet
from composer.formats.sets.adapter_set import SET_FILE, AdapterSet, SetMember, set_card
from composer.formats.sets.router import BASE, Router, fit
from registry.database.tables import Release
from registry.domain.catalog import lineage
from registry.domain.catalog.repositories import Kind
from registry.formats.manifest import ManifestFile
from registry.transfer import publishing
from registry.worker.composition import CompositionRun
from registry.worker.node_files import store_directory
from registry.worker.runner import JobRun

Files = Sequence[ManifestFile]
"""The files of an adapter; none for the base alone."""


def made_set(held: JobRun, work: CompositionRun) -> AdapterSet:
    """The set of a composition's inputs, with a router fitted on the lock's examples."""
    names = class_names([locked.repository for locked in work.lock.inputs])
    examples = work.calibration_sets(held)
    prompts = {name: _prompts([used]) for name, used in zip(names, examples, strict=False)}
    guards = _prompts(examples[len(names) :])
    members = {
        name: SetMember(repository=locked.repository, version=locked.version, commit=locked.commit)
        for name, locked in zip(names, work.lock.inputs, strict=True)
    }
    return AdapterSet.of(members, fit({**prompts, BASE: guards} if guards else prompts))


def set_files(held: JobRun, work: CompositionRun) -> list[ManifestFile]:
    """The stored files of the composition's set."""
    made = made_set(held, work)
    with TemporaryDirectory(dir=held.resources.work_directory, prefix="set-") as directory:
        (Path(directory) / SET_FILE).write_bytes(made.to_bytes())
        (Path(directory) / CARD_FILE).write_text(set_card(made), encoding="utf-8")
        files = store_directory(held.engine.node, Path(directory))
    held.made.update(file.sha256 for file in files)
    return files


def class_names(repositories: Sequence[str]) -> list[str]:
    """A short name for each repository: its last part, or both parts where two have the same one."""
    last = [repository.rpartition("/")[2] for repository in repositories]
    counted = Counter([*last, BASE])
    return [
        name if counted[name] == 1 else repository.replace("/", ".")
        for name, repository in zip(last, repositories, strict=True)
    ]


def set_of(held: JobRun, release_id: int | None) -> tuple[Router, dict[str, Files]] | None:
    """The router and the members' files of a release that is a set; None for any other subject of an evaluation."""
    with held.resources.read() as session:
        release = None if release_id is None else session.get_one(Release, release_id)
        if release is None or Kind(release.repository.kind) is not Kind.SET:
            return None
        files = publishing.manifest_files(session, release)
        by_commit = {
            used.revision.commit: publishing.manifest_files(session, used) for used in lineage.inputs(session, release)
        }
    made = publishing.read_set(held.resources, files)
    return made.routes, {name: by_commit[member.commit] for name, member in made.members.items()}


def _prompts(sets: Sequence[CalibrationSet]) -> list[str]:
    return [prompt for used in sets for prompt in (*(example.prompt for example in used.examples), *used.prompts)]
