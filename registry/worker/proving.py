"""Proves a merged model of a composition in one unit: loads it as users do, and compares its answers."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict

from composer.formats.recipes.suite import Suite
from registry.worker.composition import CompositionRun
from registry.worker.engine.units import Count, Node, Result, Task, Unit
from registry.worker.merging import StoredModel, merge_content, plan_of
from registry.worker.node_files import are_stored, fetched, from_rows, store_directory, to_rows
from registry.worker.node_models import base_checkpoint, base_hints, needs_of_model
from registry.worker.runner import JobRun


def proved_model(held: JobRun, work: CompositionRun, model: StoredModel, suites: Sequence[Suite]) -> StoredModel:
    """The model with the proof in its note, its card and its report. Raises RefusedOutput with `proof_failed`."""
    from composer.merge.proof import proof_prompts

    hints = base_hints(work.locations, work.base_bytes)
    content = {
        **merge_content(held, work),
        "files": to_rows(model.files),
        "prompts": [asdict(prompt) for prompt in proof_prompts(suites, work.phrases)],
    }
    unit = Unit(name="proof", content=content, hints=hints)
    ((_, made),) = held.engine.map(PROOF, [unit], needs_of_model(work.lock.base, hints), held.check)
    changed = {file.path: file for file in from_rows(made["files"])}
    held.made.update(file.sha256 for file in changed.values())
    files = [changed.get(file.path, file) for file in model.files]
    return StoredModel(files=files, report={**model.report, "proof": made["proof"]})


def _prove(node: Node, unit: Unit, _count: Count) -> Result:
    from composer.formats.checkpoints.card import CARD_FILE
    from composer.formats.checkpoints.staging import NOTE_FILE
    from composer.merge.proof import ProofPrompt, prove, record_proof

    plan = plan_of(node, unit.content, base_checkpoint(node, unit.content["base"], unit.hints))
    merged = fetched(node, unit.content["files"])
    node.kept("model", "", lambda: None)  # there may not be room for it and the two of the proof
    proof = prove(plan, merged, [ProofPrompt(**row) for row in unit.content["prompts"]])
    proof.refuse_failed()
    with node.scratch() as directory:
        for name in (NOTE_FILE, CARD_FILE):
            shutil.copyfile(merged / name, directory / name)
        record_proof(directory, proof)
        return {"files": to_rows(store_directory(node, directory)), "proof": proof.to_json()}


def _is_stored(node: Node, result: Result) -> bool:
    return are_stored(node, from_rows(result["files"]))


PROOF = Task(name="proof", version=1, run=_prove, intact=_is_stored)
