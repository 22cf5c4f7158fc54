"""A registry with as many releases as a large company has, written as rows: made to be searched.

Repositories of 20 releases, four bases, two suites with two metrics for each release, one channel a repository. Facts
are as long as real ones, with a rank and an alpha for each adapted module.
"""

import hashlib
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import combinations
from pathlib import Path
from typing import Any

from sqlalchemy import insert

from composer.formats.checkpoint import open_checkpoint
from registry import models
from registry.db import Row
from registry.names import Version
from registry.resources import Resources

BASES = ("base-a", "base-b", "base-c", "base-d")
SUITES = {1: "sql-exact", 2: "guard-general"}
CHANNEL = "prod"
RELEASES_EACH = 20
_PROJECTIONS = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
TARGETS = dict(enumerate([targets for size in (7, 4, 2) for targets in combinations(_PROJECTIONS, size)], 1))
_LIKED = [number for number, targets in TARGETS.items() if targets in (("q_proj", "v_proj"), _PROJECTIONS)]
"""What most people train: two of three releases have one of these sets."""
_RANKS = (4, 8, 16, 32, 64)
_LAYERS = 30
_FILES = {"README.md": 3_000, "adapter_config.json": 900, "adapter_model.safetensors": 660_000}
_START = datetime(2026, 1, 1, tzinfo=UTC)
_BY = "benchmark"

_Rows = Iterator[dict[str, Any]]


def repository_name(number: int) -> str:
    """Of the repository with this id: a team has 25."""
    return f"team-{number // 25}/adapter-{number}"


def fill(resources: Resources, checkpoint: Path, releases: int) -> None:
    """Writes `releases` releases and all that they refer to, in one transaction; the same rows on every run.

    The bases get the tensor table of `checkpoint`, with hashes made up.
    """
    chance = random.Random(7)  # noqa: S311
    repositories = range(1, releases // RELEASES_EACH + 1)
    numbers = range(1, len(repositories) * RELEASES_EACH + 1)
    tables: dict[type[Row], Iterable[Mapping[str, Any]]] = {
        models.Base: _bases(checkpoint),
        models.TargetSet: ({"id": number, "key": ",".join(targets)} for number, targets in TARGETS.items()),
        models.TargetSetMember: (
            {"target_set_id": number, "target": target} for number, targets in TARGETS.items() for target in targets
        ),
        models.Suite: _suites(),
        models.Repository: _repositories(repositories),
        models.Blob: _blobs(numbers),
        models.Revision: _revisions(numbers),
        models.RevisionFile: _files(numbers),
        models.Release: (_release(number, chance) for number in numbers),
        models.Score: (score for number in numbers for score in _scores(number, chance)),
        models.Channel: _channels(repositories),
        models.Move: _moves(repositories),
    }
    with resources.write() as session:
        for table, rows in tables.items():
            session.execute(insert(table), list(rows))


def _digest(*parts: object) -> str:
    return hashlib.sha256(":".join(map(str, parts)).encode()).hexdigest()


def _repository_of(release: int) -> int:
    return (release - 1) // RELEASES_EACH + 1


def _bases(checkpoint: Path) -> _Rows:
    architecture = open_checkpoint(checkpoint).architecture
    specs = architecture.tensors.items()
    for name in BASES:
        yield {
            "digest": _digest(name),
            "architecture_digest": _digest("architecture"),
            "name": name,
            "model_type": architecture.model_type,
            "tied": architecture.tied,
            "parameters": sum(spec.elements for _, spec in specs),
            "size_bytes": sum(spec.size_bytes for _, spec in specs),
            "tensor_count": len(specs),
            "tensors": [[tensor, spec.dtype, list(spec.shape), _digest(name, tensor)] for tensor, spec in specs],
            "created_at": _START,
            "created_by": _BY,
        }


def _suites() -> _Rows:
    for number, name in SUITES.items():
        yield {
            "id": number,
            "name": name,
            "digest": _digest(name),
            "kind": "guard" if name.startswith("guard") else "target",
            "examples": 32,
            "content": {},
            "current": True,
            "created_at": _START,
            "created_by": _BY,
        }


def _repositories(numbers: Sequence[int]) -> _Rows:
    for number in numbers:
        namespace, _, name = repository_name(number).partition("/")
        yield {"id": number, "namespace": namespace, "name": name, "kind": "adapter", "created_at": _START}


def _blobs(numbers: Sequence[int]) -> _Rows:
    for file in _files(numbers):
        yield {"sha256": file["sha256"], "size_bytes": file["size_bytes"], "created_at": _START}


def _revisions(numbers: Sequence[int]) -> _Rows:
    for number in numbers:
        commit = _digest("commit", number)[:40]
        yield {"id": number, "repository_id": _repository_of(number), "commit": commit, "created_at": _START}


def _files(numbers: Sequence[int]) -> _Rows:
    for number in numbers:
        for path, size in _FILES.items():
            yield {"revision_id": number, "path": path, "size_bytes": size, "sha256": _digest(number, path)}


def _release(number: int, chance: random.Random) -> dict[str, Any]:
    version = Version(1, (number - 1) % RELEASES_EACH, 0)
    rank = chance.choice(_RANKS)
    target_set = chance.choice(_LIKED if chance.random() < 2 / 3 else list(TARGETS))
    modules = [f"model.layers.{layer}.{target}" for layer in range(_LAYERS) for target in TARGETS[target_set]]
    facts = {
        "type": "lora",
        "variant": "lora",
        "rank_max": rank,
        "alpha": 2.0 * rank,
        "targets": list(TARGETS[target_set]),
        "modules": len(modules),
        "parameters": rank * 1000 * len(modules),
        "size_bytes": rank * 2000 * len(modules),
        "dtype": "BF16",
        "modules_to_save": [],
        "use_rslora": False,
        "ranks": dict.fromkeys(modules, rank),
        "alphas": dict.fromkeys(modules, 2.0 * rank),
        "base_model_name_or_path": "acme/base",
        "peft_version": "0.17.0",
    }
    yanked = chance.random() < 0.02
    return {
        "id": number,
        "repository_id": _repository_of(number),
        "revision_id": number,
        "version": str(version),
        "sort_key": version.sort_key,
        "stable": version.stable,
        "base_digest": _digest(chance.choice(BASES)),
        "type": "lora",
        "variant": "lora",
        "rank_max": rank,
        "target_set_id": target_set,
        "size_bytes": facts["size_bytes"],
        "facts": facts,
        "notes": "Trained again on last week's tickets.",
        "yanked": yanked,
        "yank_reason": "wrong data" if yanked else None,
        "created_at": _START + timedelta(minutes=number),
        "created_by": _BY,
    }


def _scores(release: int, chance: random.Random) -> _Rows:
    for suite in SUITES:
        for metric, value in (("accuracy", chance.random()), ("nll", 2 * chance.random())):
            yield {
                "release_id": release,
                "base_digest": None,
                "suite_id": suite,
                "metric": metric,
                "value": value,
                "stderr": 0.05,
                "n": 32,
                "higher_is_better": metric == "accuracy",
                "provenance": {"device": "cpu", "dtype": "bfloat16"},
                "measured_at": _START,
                "measured_by": _BY,
            }


def _channels(repositories: Sequence[int]) -> _Rows:
    for number in repositories:
        yield {"id": number, "repository_id": number, "name": CHANNEL, "move_id": number}


def _moves(repositories: Sequence[int]) -> _Rows:
    """Each channel serves the first release of its repository."""
    for number in repositories:
        yield {
            "id": number,
            "channel_id": number,
            "kind": "promote",
            "from_release_id": None,
            "to_release_id": (number - 1) * RELEASES_EACH + 1,
            "below_id": None,
            "actor": _BY,
            "reason": "",
            "forced": False,
            "gates": [],
            "at": _START,
        }
