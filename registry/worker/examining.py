"""Measures a composition's candidate, its inputs and the base: in this process, or on the nodes of a cluster."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from composer.formats.checkpoints.hashing import hash_file
from composer.formats.recipes.suite import Example, Suite
from registry.formats.manifest import ManifestFile
from registry.formats.references import Digest, parse_reference
from registry.transfer import uploads
from registry.worker import merging
from registry.worker.composition import CompositionRun, Output, creator
from registry.worker.evaluation_units import Examined, examine_on_nodes
from registry.worker.judging import Examine, Subject
from registry.worker.node_models import OneModel, base_hints
from registry.worker.runner import JobRun

if TYPE_CHECKING:
    from composer.deltas.delta import Delta
    from composer.evaluation.evaluate import Result
    from composer.evaluation.model import LoadedModel


def candidate_of(held: JobRun, work: CompositionRun) -> Subject:
    """The candidate. Other nodes read its files from the store, where publishing needs them too."""
    files: Sequence[ManifestFile] = ()
    if not work.recipe.adapter:
        if held.engine.spreads:
            files = merging.stored_model(held, work, ()).files  # made by `merge`
        return Subject(directory=work.model_directory, files=files, merged=True)
    if held.engine.spreads:
        files = store_output(held, work.outputs[0])
    return Subject(directory=work.adapter_directory, files=files)


def store_output(held: JobRun, output: Output) -> list[ManifestFile]:
    """Stores the files of an output with the creator's current roles, and returns their manifest."""
    with held.resources.read() as session:
        actor = creator(held, session)
    namespace, files = parse_reference(output.target).repository.namespace, list[ManifestFile]()
    for path in sorted(path for path in output.directory.rglob("*") if path.is_file()):
        digest = Digest(hash_file(path, held.check))
        name = path.relative_to(output.directory).as_posix()
        files.append(ManifestFile(name, path.stat().st_size, digest))
        uploads.store_file(held.resources, actor, namespace, digest, path, move=False)
        held.check()
    return files


def examiner(held: JobRun, work: CompositionRun, progress: Callable[[int], None]) -> Examine:
    """How this worker measures; `progress` gets the number of examples just done."""
    if held.engine.spreads:
        return _on_nodes(held, work, progress)
    return _in_this_process(held, work, progress)


def _on_nodes(held: JobRun, work: CompositionRun, progress: Callable[[int], None]) -> Examine:
    hints = base_hints(work.locations, work.base_bytes)

    def examine(subject: Subject, suite: Suite, examples: Sequence[Example]) -> "Sequence[Result]":
        examined = Examined(base=work.lock.base, hints=hints, files=subject.files, model=subject.merged)
        return examine_on_nodes(held, examined, suite, examples, progress)

    return examine


def _in_this_process(held: JobRun, work: CompositionRun, progress: Callable[[int], None]) -> Examine:
    scorers = held.resources.settings.enabled_scorers

    models = OneModel()

    def model(merged: bool) -> "LoadedModel":
        from composer.evaluation.model import load_model

        return models.get(
            merged, lambda: load_model(work.model_directory if merged else work.base_checkpoint(held).path)
        )

    def deltas(subject: Subject) -> "Sequence[Delta]":
        from composer.deltas.variants.load import load_deltas

        if subject.directory is None or subject.merged:
            return ()
        return load_deltas(subject.directory, work.architecture).deltas

    def examine(subject: Subject, suite: Suite, examples: Sequence[Example]) -> "Sequence[Result]":
        from composer.evaluation.evaluate import examine

        loaded = model(subject.merged)
        return examine(loaded, suite, deltas(subject), examples, scorers, lambda batch: progress(len(batch)))

    return examine
