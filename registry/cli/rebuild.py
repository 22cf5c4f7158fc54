"""A composed model made again from what its release names as its inputs."""

from pathlib import Path
from typing import Any

from registry.cli import render
from registry.cli.connect import Connection, base_checkpoint, release_directory, resolved
from registry.errors import Invalid, NotAllowed, Refused

Json = dict[str, Any]


def rebuilt(connection: Connection, release: Json, directory: Path, base_dir: Path | None) -> Json:
    """Pulls the inputs, merges them into the base again and compares with the release's files in `directory`.

    The registry says which inputs and weights they were, the release's own note how they were merged; Refused when the
    two disagree, and for a release that no composition made.
    """
    from composer.formats.checkpoint import read_json
    from composer.output import NOTE_FILE
    from composer.rebuild import plan_rebuild, rebuild

    name = f"{release['repository']}:{release['version']}"
    if release["kind"] != "model" or not release["inputs"]:
        raise Refused(
            "no_lineage",
            f"{name} is no merged model that a composition made: there is nothing to make it from again.",
            subject=name,
            next_step="Name a model with inputs (adaptory show REF).",
        )
    note = read_json(directory / NOTE_FILE, "missing_note", "Ask who published it.")
    told = [row.get("weight") for row in note.get("adapters", [])]
    told = [weight["value"] if isinstance(weight, dict) else weight for weight in told]
    if told != [row["weight"] for row in release["inputs"]]:
        raise Invalid(
            "lineage_differs",
            f"The note in {name} tells of other weights than the registry.",
            subject=name,
            next_step="Do not serve it; ask who published it.",
        )
    if any(row["repository"] is None for row in release["inputs"]):
        raise NotAllowed(
            "hidden_input",
            f"{name} was made from adapters that you may not read.",
            subject=name,
            next_step="Ask an administrator of their namespace.",
        )
    inputs = [resolved(connection, f"{row['repository']}:{row['version']}") for row in release["inputs"]]
    adapters = [release_directory(connection, found) for found in inputs]
    checkpoint = base_checkpoint(connection.api.base(release["base"]["digest"]), base_dir)
    plan = plan_rebuild(directory, checkpoint, adapters)
    with render.progress(f"rebuild {name}", plan.size_bytes) as done:
        return rebuild(plan, directory, progress=done).to_json()
