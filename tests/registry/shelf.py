"""A hundred and fifty releases that differ in everything that a search may filter by: in a registry, and as plain
values."""

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

from composer.formats.adapters.serving import SERVERS
from composer.formats.checkpoints.hashing import weights_digest
from composer.formats.recipes.suite import Suite
from registry.database.engine import Database, Session
from registry.database.tables import Base, Blob, BlobHolder
from registry.domain.access.audit import Actor
from registry.domain.access.namespaces import find_or_create
from registry.domain.access.roles import EVERYWHERE, Role
from registry.domain.catalog import bases, releases, suite_registration, suites
from registry.domain.catalog.bases import NewBase, TensorRow
from registry.domain.catalog.releases import NewRelease
from registry.domain.catalog.repositories import Kind
from registry.domain.catalog.suites import Measurement
from registry.domain.channels import promotions, withdrawals
from registry.domain.channels.moves import PromotionRequest
from registry.formats.manifest import ManifestFile
from registry.formats.references import Digest, RepositoryName, Version

START = datetime(2026, 1, 1, tzinfo=UTC)
HOST = Actor("host", START, {EVERYWHERE: Role.ADMIN.value}, mints=True)
NAMESPACES = ("acme", "beta", "open")
RELATIONS = {"cast": ("plain", "cast"), "quantized": ("cast", "quantized"), "tuned": ("plain", "finetuned")}
"""base -> its origin and relation; `plain` and `other` have none."""
BASES = ("plain", *RELATIONS, "other")
TARGETS = (("q_proj",), ("q_proj", "v_proj"), ("k_proj", "o_proj", "q_proj", "v_proj"), ("down_proj", "up_proj"))
RANKS = (4, 8, 16, 64)
NOTES = ("", "Trained on tickets", "Retrained: Größe, TICKETS and more", "x" * 60 + " end")
SUITES = ("sql-exact", "guard")
METRICS = {"accuracy": True, "nll": False}
CHANNELS = ("prod", "canary")
STATED: tuple[Mapping[str, object], ...] = (
    {},
    {"trainer": "TRL 0.20", "hyperparameters": {"lr": 3e-3, "modules": ["q_proj", "v_proj"]}},
    {"trainer": "Axolotl", "run_url": f"https://runs.example/{'x' * 300}", "hyperparameters": {"lr": "0.0030"}},
    {"data": [{"name": "Tickets", "digest": "sha256:ab12", "license": "cc-by-4.0"}, {"name": "ab12"}], "tags": ["sql"]},
)


@dataclass(frozen=True)
class Item:
    """One release as plain values. `served` are the channels that serve it."""

    id: int
    repository: RepositoryName
    kind: str
    version: Version
    base: str
    facts: Mapping[str, object]
    license: str | None
    servers: int
    notes: str
    size_bytes: int
    provenance: Mapping[str, object]
    yanked: bool = False
    served: frozenset[str] = frozenset()
    scores: Mapping[tuple[str, str], float] = field(default_factory=dict)


def stock(database: Database, seed: int = 5, count: int = 150) -> list[Item]:
    chance = random.Random(seed)
    with database.write() as session:
        digests = _bases(session)
        for number, name in enumerate(SUITES):
            examples = [{"prompt": f"{number} {i}", "completion": "x"} for i in range(6)]
            content = {"name": name, "kind": "target", "chat": False, "examples": examples}
            suite_registration.add(session, HOST, Suite.from_json(content))
        items = [_publish(session, chance, number, digests) for number in range(count)]
        return _move_and_yank(session, chance, items)


def _bases(session: Session) -> dict[str, str]:
    digests: dict[str, str] = {}
    for name in BASES:
        sha256 = Digest(hashlib.sha256(name.encode()).hexdigest())
        rows = [TensorRow("w", "F32", (2, 2), sha256)]
        digest = Digest(weights_digest((row.name, row.dtype, row.shape, row.sha256) for row in rows))
        made_from, relation = RELATIONS.get(name, (None, None))
        license_ = "mit" if name == BASES[0] else None
        new = NewBase(name, "llama", False, rows, digest, [f"Hub/{name}"], [], made_from, relation, license_)
        digests[name] = bases.register(session, HOST, new)[0].digest
    return digests


def _publish(session: Session, chance: random.Random, number: int, digests: Mapping[str, str]) -> Item:
    namespace = chance.choice(NAMESPACES)
    find_or_create(session, HOST, namespace)
    kind = Kind.MODEL if chance.random() < 0.1 else Kind.ADAPTER
    name = RepositoryName(namespace, f"{kind}-{chance.randrange(4)}")
    size = chance.choice((10, 1_000, 100_000))
    sha256 = Digest(hashlib.sha256(str(number).encode()).hexdigest())
    session.add(Blob(sha256=sha256, size_bytes=size, created_at=START))
    session.flush()
    session.add(BlobHolder(sha256=sha256, namespace=namespace))
    session.flush()
    rank = chance.choice(RANKS)
    facts: dict[str, object] = {
        "type": chance.choice(("lora", "loha")),
        "variant": chance.choice(("lora", "dora")),
        "dtype": chance.choice(("BF16", "F32")),
    }
    if kind is Kind.ADAPTER:
        facts |= {"rank_max": rank, "alpha": float(rank), "targets": list(chance.choice(TARGETS))}
    major, prerelease = number + 1, ("rc", "1") if chance.random() < 0.2 else ()
    item = Item(
        0,
        name,
        str(kind),
        Version(major if chance.random() < 0.7 else major % 7 + 1, number, 0, prerelease),
        chance.choice(BASES),
        facts,
        chance.choice((None, "apache-2.0", "llama3")),
        chance.randrange(1 << len(SERVERS)),
        chance.choice(NOTES),
        size,
        STATED[number % len(STATED)],
    )
    new = NewRelease(
        name,
        kind,
        item.version,
        None,
        [ManifestFile("weights.safetensors", size, sha256)],
        digests[item.base],
        facts,
        item.notes,
        allow_breaking="a test",
        provenance={**item.provenance, **({"license": item.license} if item.license else {})},
        servers=item.servers,
    )
    actor = replace(HOST, at=START + timedelta(seconds=number))
    release, created = releases.publish(session, actor, new)
    assert created
    scores: dict[tuple[str, str], float] = {}
    for suite in SUITES:
        for metric, better in METRICS.items():
            if chance.random() < 0.7:
                value = chance.choice((0.0, 0.25, 0.5, 0.5, 1.0))
                digest = suites.find(session, suite).digest
                suites.record(session, actor, release, [Measurement(digest, metric, value, None, 6, better)])
                scores[suite, metric] = value
    return replace(item, id=release.id, scores=scores)


def _move_and_yank(session: Session, chance: random.Random, items: list[Item]) -> list[Item]:
    """Channels are promoted to several releases each, then some releases are yanked: channels fall back."""
    made: dict[tuple[RepositoryName, str], list[int]] = {}
    by_id = {item.id: item for item in items}
    for item in items:
        if chance.random() < 0.5:
            channel = chance.choice(CHANNELS)
            promotions.request(session, HOST, PromotionRequest(item.repository, item.version, channel))
            made.setdefault((item.repository, channel), []).append(item.id)
    for item in items:
        if chance.random() < 0.25:
            withdrawals.yank(session, HOST, releases.find(session, item.repository, item.version), "wrong data")
            by_id[item.id] = replace(by_id[item.id], yanked=True)
    for (_, channel), stack in made.items():
        served = next((number for number in reversed(stack) if not by_id[number].yanked), None)
        if served is not None:
            by_id[served] = replace(by_id[served], served=by_id[served].served | {channel})
    assert session.query(Base).count() == len(BASES)
    return list(by_id.values())
