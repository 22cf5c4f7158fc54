"""A registry as large as a big company's, inserted as rows, for search benchmarks.

Repositories of 20 releases, four bases, two suites with two metrics for each release, one channel per repository. Facts
are as long as real ones; one release in ten is for PEFT only.
"""

import hashlib
import random
import uuid
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from datetime import UTC, datetime, timedelta
from itertools import combinations, islice
from pathlib import Path
from typing import Any

from sqlalchemy import insert, select, text, update
from sqlalchemy.orm import Session

from composer.formats.adapters.serving import SERVERS
from composer.formats.checkpoints.checkpoint import open_checkpoint
from registry.database import tables
from registry.database.engine import Database, Row
from registry.database.migrate import migrate
from registry.database.tables import Channel, Move, Release
from registry.domain.catalog import search_index
from registry.formats.manifest import ManifestFile, canonical_manifest, commit_id
from registry.formats.references import Digest, Version

BASES = ("base-a", "base-b", "base-c", "base-d")
SUITES = {1: "sql-exact", 2: "guard-general"}
CHANNEL = "prod"
NOTES = "Trained again on last week's tickets."
RELEASES_EACH = 20
_PROJECTIONS = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
TARGETS = dict(enumerate([targets for size in (7, 4, 2) for targets in combinations(_PROJECTIONS, size)], 1))
_LIKED = [number for number, targets in TARGETS.items() if targets in (("q_proj", "v_proj"), _PROJECTIONS)]
"""The target sets that most people train: two of three releases have one of these."""
_RANKS = (4, 8, 16, 32, 64)
_LAYERS = 30
_FILES = {"README.md": 3_000, "adapter_config.json": 900, "adapter_model.safetensors": 660_000}
_START = datetime(2026, 1, 1, tzinfo=UTC)
_BY = "benchmark"

_Rows = Iterator[dict[str, Any]]


def repository_name(number: int) -> str:
    """Name of the repository with this id: a team has 25."""
    return f"team-{number // 25}/adapter-{number}"


def fill(database: Database, checkpoint: Path, releases: int) -> None:
    """Writes `releases` releases and everything they refer to, in one transaction; the same rows on every run.

    The bases get the tensor table of `checkpoint`, with invented hashes.
    """
    chance = random.Random(7)  # noqa: S311
    repositories = range(1, releases // RELEASES_EACH + 1)
    numbers = range(1, len(repositories) * RELEASES_EACH + 1)
    made = [_facts(chance) for _ in numbers]
    traits = {key: number for number, key in enumerate(dict.fromkeys(made), 1)}
    contents: dict[type[Row], Iterable[Mapping[str, Any]]] = {
        tables.Base: _bases(checkpoint),
        tables.TargetSet: (
            {"id": number, "key": search_index.target_set_key(targets)} for number, targets in TARGETS.items()
        ),
        tables.TargetSetMember: (
            {"target_set_id": number, "target": target} for number, targets in TARGETS.items() for target in targets
        ),
        tables.Traits: (_traits(facts, number) for facts, number in traits.items()),
        tables.SuiteVersion: _suites(),
        tables.Namespace: _namespaces(repositories),
        tables.Repository: _repositories(repositories),
        tables.Blob: _blobs(numbers),
        tables.Revision: _revisions(numbers),
        tables.RevisionFile: _files(numbers),
        tables.Release: (_release(number, made[number - 1], traits, chance) for number in numbers),
        tables.ReleaseWord: (word for number in numbers for word in _words(number)),
        tables.Score: (score for number in numbers for score in _scores(number, traits[made[number - 1]], chance)),
        tables.Channel: _channels(repositories),
        tables.Move: _moves(repositories),
    }
    with database.write() as session:
        for table, rows in contents.items():
            _insert(session, table, iter(rows))
            if not database.is_sqlite and "id" in table.__table__.c:  # later rows continue from there
                name = table.__tablename__
                session.execute(text(f"SELECT setval(pg_get_serial_sequence('{name}', 'id'), max(id)) FROM {name}"))  # noqa: S608
        session.execute(_SERVE)
    with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        # PostgreSQL does this by itself some time later.
        connection.execute(text("ANALYZE" if database.is_sqlite else "VACUUM ANALYZE"))


_of_move = select(Release.id, Release.sort_key).join(Move, Move.to_release_id == Release.id)
_of_move = _of_move.where(Move.id == Channel.move_id, ~Release.yanked).correlate(Channel)
_SERVE = update(Channel).values(
    served_id=_of_move.with_only_columns(Release.id).scalar_subquery(),
    served_key=_of_move.with_only_columns(Release.sort_key).scalar_subquery(),
)
"""A channel whose first release is yanked serves none: there is no earlier release."""


@contextmanager
def databases(directory: Path, postgres: str | None, checkpoint: Path, releases: int) -> Generator[dict[str, str]]:
    """Yields a filled database of each kind: name -> URL. PostgreSQL only where there is a server."""
    with ExitStack() as stack:
        urls = {"SQLite": stack.enter_context(empty_database(None, directory / f"{releases}.db"))}
        if postgres:
            urls["PostgreSQL"] = stack.enter_context(empty_database(postgres, directory))
        for url in urls.values():
            with closing(Database(url)) as database:
                migrate(database)
                fill(database, checkpoint, releases)
        yield urls


@contextmanager
def empty_database(postgres: str | None, file: Path) -> Generator[str]:
    """Yields the URL of a new database on that server, dropped at the end, or of the SQLite database `file`."""
    if postgres is None:
        yield f"sqlite:///{file}"
        return
    made = f"bench_{uuid.uuid4().hex[:12]}"
    _administer(postgres, f"CREATE DATABASE {made}")
    try:
        yield f"{postgres.rpartition('/')[0]}/{made}"
    finally:
        _administer(postgres, f"DROP DATABASE {made} WITH (FORCE)")


def _administer(postgres: str, statement: str) -> None:
    with closing(Database(postgres)) as database:
        connection = database.engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        with connection:
            connection.execute(text(statement))


def versions(releases: int) -> list[tuple[str, dict[str, str]]]:
    """The releases that `fill` writes, each with its repository, and its searchable facts and scores as tags."""
    chance = random.Random(7)  # noqa: S311
    made = [_facts(chance) for _ in range(releases // RELEASES_EACH * RELEASES_EACH)]
    rows: list[tuple[str, dict[str, str]]] = []
    for number, facts in enumerate(made, 1):
        base, rank, target_set, _ = facts
        shared = ("type", "variant", "alpha", "dtype", "license", "servers")
        tags = {"base": base, "rank": str(rank), "targets": ",".join(TARGETS[target_set])}
        tags |= {name: str(value) for name, value in _columns(facts).items() if name in shared}
        tags |= {f"{SUITES[row['suite_id']]}.{row['metric']}": str(row["value"]) for row in _scores(number, 0, chance)}
        rows.append((repository_name(_repository_of(number)), tags))
    return rows


def _insert(session: Session, table: type[Row], rows: Iterator[Mapping[str, Any]]) -> None:
    while some := list(islice(rows, 5_000)):
        session.execute(insert(table.__table__), some)  # pyright: ignore


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


def _namespaces(repositories: Sequence[int]) -> _Rows:
    for name in dict.fromkeys(repository_name(number).partition("/")[0] for number in repositories):
        yield {
            "name": name,
            "public": False,
            "require_signature": False,
            "signing_keys": [],
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


def _manifest(number: int) -> bytes:
    return canonical_manifest(ManifestFile(path, size, Digest(_digest(number, path))) for path, size in _FILES.items())


def _revisions(numbers: Sequence[int]) -> _Rows:
    for number in numbers:
        manifest = _manifest(number)
        yield {
            "id": number,
            "repository_id": _repository_of(number),
            "commit": commit_id(manifest),
            "manifest": manifest.decode(),
            "created_at": _START,
        }


def _files(numbers: Sequence[int]) -> _Rows:
    for number in numbers:
        for path, size in _FILES.items():
            yield {"revision_id": number, "path": path, "size_bytes": size, "sha256": _digest(number, path)}


_Facts = tuple[str, int, int, int]
"""Base, rank, target set and mask of servers."""


def _facts(chance: random.Random) -> _Facts:
    target_set = chance.choice(_LIKED if chance.random() < 2 / 3 else list(TARGETS))
    servers = 1 << SERVERS.index("peft") if chance.random() < 0.1 else (1 << len(SERVERS)) - 1
    return chance.choice(BASES), chance.choice(_RANKS), target_set, servers


def _columns(facts: _Facts) -> dict[str, Any]:
    """Columns that a release and its traits share."""
    base, rank, target_set, servers = facts
    return {
        "base_digest": _digest(base),
        "type": "lora",
        "variant": "lora",
        "rank_max": rank,
        "alpha": 2.0 * rank,
        "dtype": "BF16",
        "license": "apache-2.0",
        "target_set_id": target_set,
        "servers": servers,
    }


def _traits(facts: _Facts, number: int) -> dict[str, Any]:
    return {"id": number, "key": _digest("traits", number), "kind": "adapter", **_columns(facts)}


def _release(number: int, facts: _Facts, traits: Mapping[_Facts, int], chance: random.Random) -> dict[str, Any]:
    version = Version(1, (number - 1) % RELEASES_EACH, 0)
    _, rank, target_set, servers = facts
    modules = _LAYERS * len(TARGETS[target_set])
    summary = {
        "type": "lora",
        "variant": "lora",
        "rank_max": rank,
        "alpha": 2.0 * rank,
        "targets": list(TARGETS[target_set]),
        "modules": modules,
        "parameters": rank * 1000 * modules,
        "size_bytes": rank * 2000 * modules,
        "dtype": "BF16",
        "modules_to_save": [],
        "use_rslora": False,
        "ranks": {},
        "alphas": {},
        "base_model_name_or_path": "acme/base",
        "peft_version": "0.17.0",
    }
    refusal = {"reasons": ["bias=lora_only is refused"], "way_out": ["merge: bake it into a checkpoint"]}
    yanked = chance.random() < 0.02
    return {
        "id": number,
        "repository_id": _repository_of(number),
        "revision_id": number,
        "version": str(version),
        "sort_key": version.sort_key,
        "stable": version.stable,
        **_columns(facts),
        "traits_id": traits[facts],
        "size_bytes": summary["size_bytes"],
        "facts": summary,
        "provenance": _provenance(number),
        "spectrum": None,
        "loading": {server: refusal for bit, server in enumerate(SERVERS) if not servers >> bit & 1},
        "breaking_reason": None,
        "signed_by": None,
        "notes": NOTES,
        "yanked": yanked,
        "yank_reason": "wrong data" if yanked else None,
        "created_at": _START + timedelta(minutes=number),
        "created_by": _BY,
    }


def _words(number: int) -> _Rows:
    namespace, _, name = repository_name(_repository_of(number)).partition("/")
    entries = search_index.text_terms(f"{namespace} {name} {NOTES}") + search_index.provenance_terms(
        _provenance(number)
    )
    for entry in entries + search_index.namespace_terms(namespace, name):
        yield {"word": entry, "release_id": number}


def _provenance(number: int) -> dict[str, str]:
    return {"trainer": "trl 0.20", "run_url": f"https://runs.example/{number}"}


def _scores(release: int, traits_id: int, chance: random.Random) -> _Rows:
    for suite in SUITES:
        for metric, value in (("accuracy", chance.random()), ("nll", 2 * chance.random())):
            yield {
                "release_id": release,
                "traits_id": traits_id,
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
