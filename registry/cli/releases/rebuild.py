"""Rebuild a composed model from the inputs that its release names."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from registry import wire
from registry.cli.console import render
from registry.cli.console.connect import base_checkpoint, release_directory, resolved
from registry.errors import Invalid, NotAllowed, Refused, Usage
from registry.sdk.connection import Connection

if TYPE_CHECKING:
    from composer.merge.rebuild import Rebuilt


def rebuilt(
    connection: Connection, release: "wire.search.ResolvedRelease", directory: Path, base_dir: Path | None
) -> "Rebuilt":
    """Pulls the inputs, merges them into the base again and compares with the release's verified files in `directory`.

    The registry knows the inputs and weights, the release's own note how they were merged. Raises Refused for a release
    that is not a composition's, Invalid if registry and note disagree, NotAllowed for a hidden input.
    """
    from composer.merge.rebuild import plan_rebuild, rebuild

    name = release.name
    lineage = connection.api.get(release.path, wire.catalog.ReleaseOut).inputs
    if release.kind != "model" or not lineage:
        raise Refused(
            "no_lineage", f"{name} is not a merged model from a composition, so it cannot be rebuilt.", subject=name
        )
    if any(row.repository is None for row in lineage):
        raise NotAllowed("hidden_input", f"{name} was made from adapters to which you have no access.", subject=name)
    inputs = [resolved(connection, f"{row.repository}:{row.version}") for row in lineage]
    adapters = [release_directory(connection, source) for source in inputs]
    checkpoint = base_checkpoint(connection.api.base(release.base.digest), base_dir)
    plan = plan_rebuild(directory, checkpoint, adapters)
    # Compared as multisets: the note keeps the recipe's order, the registry that of publication.
    known = Counter(zip(map(_weights_digest, inputs), (row.weight for row in lineage), strict=True))
    if known != Counter((use.digest, use.weight.value) for use in plan.adapters):
        raise Invalid(
            "lineage_differs", f"The note in {name} names other adapters or weights than the registry.", subject=name
        )
    with render.progress(f"rebuild {name}", plan.size_bytes) as done:
        return rebuild(plan, directory, progress=done)


def _weights_digest(release: "wire.search.ResolvedRelease") -> str:
    """The SHA-256 of an adapter's weights, by which a note names the adapter."""
    from composer.formats.adapters.facts import WEIGHTS_FILE

    return next(file.sha256 for file in release.files if file.path == WEIGHTS_FILE)


def rebuilt_here(directory: Path, base_dir: Path | None, adapters: list[Path], *, dequantize: bool) -> "Rebuilt":
    """Rebuilds what `adaptory merge` wrote into a directory, from the named base and adapters."""
    from composer.formats.checkpoints.checkpoint import open_checkpoint
    from composer.merge.rebuild import plan_rebuild, rebuild

    if base_dir is None or not adapters:
        raise Usage(
            "nothing_to_verify",
            f"{directory} is a directory without a note of its inputs.",
            subject=str(directory),
            next_step="Add --base-dir DIR, and --adapter DIR for each adapter that was merged.",
        )
    if weighted := next((path for path in adapters if "=" in path.name and not path.is_dir()), None):
        message = f"--adapter {weighted} does not name a directory; the weights come from the merge's note."
        raise Usage("idle_weight", message, subject=str(weighted))
    plan = plan_rebuild(directory, open_checkpoint(base_dir, dequantize), adapters)
    with render.progress(f"rebuild {directory}", plan.size_bytes) as done:
        return rebuild(plan, directory, progress=done)
