"""Two private namespaces and a public one, each with one of everything, and a user in every role."""

import hashlib
import itertools
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path

import httpx2

from composer.formats.checkpoints.hashing import weights_digest
from composer.formats.recipes.recipe import parse_recipe
from composer.formats.recipes.suite import Suite
from registry.api.app import create_app
from registry.client.inprocess import InProcessTransport
from registry.database.tables import Blob, BlobHolder, Upload
from registry.domain.access import namespaces, tokens
from registry.domain.access.audit import Actor
from registry.domain.access.namespaces import NamespaceChange
from registry.domain.access.roles import EVERYWHERE, Role
from registry.domain.access.tokens import NewToken
from registry.domain.catalog import bases, releases, suite_registration, suites
from registry.domain.catalog.bases import NewBase, TensorRow
from registry.domain.catalog.releases import NewRelease
from registry.domain.catalog.repositories import Kind
from registry.domain.catalog.suites import Measurement
from registry.domain.channels import promotions
from registry.domain.channels.moves import PromotionRequest
from registry.domain.compositions import checks, compositions, locking
from registry.domain.jobs import queue
from registry.environment.settings import Settings
from registry.formats.manifest import ManifestFile
from registry.formats.references import Digest, RepositoryName, Version
from registry.transfer.resources import Resources, open_resources
from tests import services
from tests.command_environment import environment

NOW = datetime(2026, 1, 1, tzinfo=UTC)
HOST = Actor("host", NOW, {EVERYWHERE: Role.ADMIN.value}, mints=True)
PRIVATE, PUBLIC, OTHER = "acme", "open", "other"
ROLES = {
    "reader": Role.READER, "agent": Role.AGENT, "publisher": Role.PUBLISHER, "releaser": Role.RELEASER,
    "admin": Role.ADMIN,
}  # fmt: skip
CALLERS = ("nobody", "stranger", *ROLES, "operator", "revoked", "expired", "narrowed")
"""`stranger` is an admin in OTHER alone; `narrowed` is an admin everywhere with a token that reads OTHER alone."""
FACTS = {
    "type": "LORA", "variant": "lora", "rank_max": 4, "alpha": 8.0, "targets": ["q_proj"], "modules": 1,
    "parameters": 8, "size_bytes": 32, "dtype": "F32", "modules_to_save": [],
    "use_rslora": False, "ranks": {}, "alphas": {},
    "base_model_name_or_path": None, "peft_version": None,
}  # fmt: skip

MODEL_FACTS = {"type": "model", "variant": "merged", "parameters": 4, "size_bytes": 16, "dtype": "F32"}

SET_FACTS = {**MODEL_FACTS, "type": "set", "variant": "set", "members": ["sql"], "rank_max": 4, "targets": ["q_proj"]}
NAMED = {
    Kind.ADAPTER: ("sql", FACTS),
    Kind.MODEL: ("merged", MODEL_FACTS),
    Kind.SET: ("assistants", SET_FACTS),
}


@dataclass(frozen=True)
class Things:
    """The ids of one namespace's things."""

    namespace: str
    sha256: str
    job_id: int
    composition_id: int
    upload_id: str
    announced: str
    check_id: int


@dataclass
class House:
    """`place` is the environment that leads to its database and its store."""

    environ: Mapping[str, str]
    resources: Resources
    things: dict[str, Things]
    secrets: dict[str, str]
    ids: dict[str, str]
    transport: InProcessTransport

    def ask(self, caller: str, method: str, path: str, **request: object) -> httpx2.Response:
        headers = {"Authorization": f"Bearer {self.secrets[caller]}"} if caller != "nobody" else {}
        headers |= request.pop("headers", {})  # type: ignore[arg-type]
        with httpx2.Client(base_url="http://registry", transport=_Borrowed(self.transport)) as http:
            return http.request(method, path, headers=headers, **request)  # type: ignore[arg-type]

    def close(self) -> None:
        self.transport.close()
        self.resources.close()


def borrowed(house: House) -> httpx2.BaseTransport:
    """The way to its server, for a client of one's own."""
    return _Borrowed(house.transport)


class _Borrowed(httpx2.BaseTransport):
    """A transport that stays open when its client closes."""

    def __init__(self, lender: httpx2.BaseTransport) -> None:
        self._lender = lender

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        return self._lender.handle_request(request)


def copy_of(house: House, home: Path) -> dict[str, str]:
    """The place of a copy of a house that is closed. Both keep their blobs under one prefix."""
    shutil.copytree(house.environ["ADAPTORY_HOME"], home)
    environ = {**house.environ, "ADAPTORY_HOME": str(home)}
    if url := environ.get("ADAPTORY_DATABASE_URL"):
        environ["ADAPTORY_DATABASE_URL"] = services.copied_database(url)
    return environ


def opened(environ: Mapping[str, str], **limits: object) -> Resources:
    with environment(environ, ["adaptory"]):
        return open_resources(Settings(**{"access_cache_s": 0, **limits}))  # type: ignore[arg-type]


def entered(house: House, environ: Mapping[str, str], **limits: object) -> House:
    """The same things behind another server."""
    resources = opened(environ, **limits)
    transport = InProcessTransport(create_app(resources, tokens=True))
    return House(environ, resources, house.things, house.secrets, house.ids, transport)


@cache
def furnished_house(pairing: str) -> House:
    """A closed registry, to be copied for each test: it is built once in each process, which takes a second."""
    home = services.shared_directory() / f"house-{uuid.uuid4().hex}"
    house = _build({"ADAPTORY_HOME": str(home), **services.pairing(pairing, kept=True)})
    house.close()
    return house


def new_house(pairing: str, home: Path, **more: str) -> House:
    """A registry of one's own: a copy with its own blobs, and with more variables in its environment."""
    house = furnished_house(pairing)
    shutil.copytree(house.environ["ADAPTORY_HOME"], home, dirs_exist_ok=True)
    elsewhere = {name: text for name, text in house.environ.items() if name != "ADAPTORY_HOME"}
    environ = {"ADAPTORY_HOME": str(home), **services.copied_pairing(elsewhere, blobs=True), **more}
    own = replace(house, things=dict(house.things), secrets=dict(house.secrets), ids=dict(house.ids))
    return entered(own, environ)


def publish_once(home: Path) -> None:
    """Publishes into a new registry, which compiles the statements of a publication."""
    resources = opened({"ADAPTORY_HOME": str(home)})
    _publish_yardsticks(resources)
    _furnish(resources, PRIVATE)
    resources.close()


def _build(environ: Mapping[str, str]) -> House:
    resources = opened(environ)
    _publish_yardsticks(resources)
    things = {name: _furnish(resources, name) for name in (PRIVATE, PUBLIC, OTHER)}
    with resources.write() as session:
        namespaces.change(session, HOST, PUBLIC, NamespaceChange(public=True))
    secrets, ids = _hand_out(resources)
    return House(environ, resources, things, secrets, ids, InProcessTransport(create_app(resources, tokens=True)))


def _publish_yardsticks(resources: Resources) -> None:
    sha = Digest(hashlib.sha256(b"w").hexdigest())
    rows = [TensorRow("w", "F32", (2, 2), sha)]
    digest = Digest(weights_digest([("w", "F32", (2, 2), sha)]))
    with resources.write() as session:
        bases.register(session, HOST, NewBase("tiny", "llama", False, rows, digest))
        document = {"name": "exact", "kind": "target", "chat": False, "examples": [{"prompt": "a", "completion": "b"}]}
        suite_registration.add(session, HOST, Suite.from_json(document))


def _furnish(resources: Resources, namespace: str) -> Things:
    content = f"weights of {namespace}".encode()
    file = resources.work_directory / namespace
    file.write_bytes(content)
    sha256 = Digest(hashlib.sha256(content).hexdigest())
    resources.store.put(sha256, file)
    files = [ManifestFile("weights.safetensors", len(content), sha256)]
    with resources.write() as session:
        base = bases.find(session, "tiny")
        session.add(Blob(sha256=sha256, size_bytes=len(content), created_at=NOW))
        session.flush()
        session.add(BlobHolder(sha256=sha256, namespace=namespace))
        session.flush()
        for (kind, (name, facts)), version in itertools.product(NAMED.items(), (Version(1, 0, 0), Version(1, 1, 0))):
            new = NewRelease(RepositoryName(namespace, name), kind, version, None, files, base.digest, facts)
            release, _ = releases.publish(session, HOST, new)
            promotions.request(session, HOST, PromotionRequest(new.repository, version, "prod"))
            suite = suites.find(session, "exact")
            suites.record(session, HOST, release, [Measurement(suite.digest, "nll", 0.5, None, 1, False)])
        recipe = parse_recipe({"base": "tiny", "inputs": [{"adapter": f"{namespace}/sql:1.0.0"}], "method": "stack"})
        composition = compositions.create(session, HOST, recipe, plan_only=True)
        job_id, composition_id = composition.job_id, composition.id
        compositions.cancel(session, HOST, composition_id)  # or its stream of events would have no end
        check = checks.request(
            session, HOST, locking.lock_inputs(session, recipe, *locking.resolve_inputs(session, recipe))
        )
        queue.request_cancel(session, check.job_id or 0, NOW)
        upload = Upload(
            id=f"upload-{namespace}",
            namespace=namespace,
            sha256=hashlib.sha256(f"{namespace}!".encode()).hexdigest(),
            size_bytes=len(namespace) + 1,
            multipart_id=None,
            part_bytes=None,
            created_at=NOW,
            created_by="publisher",
            expires_at=datetime.now(UTC) + timedelta(days=1),
        )
        session.add(upload)
    return Things(namespace, sha256, job_id, composition_id, upload.id, upload.sha256, check.id)


def _hand_out(resources: Resources) -> tuple[dict[str, str], dict[str, str]]:
    secrets: dict[str, str] = {}
    ids: dict[str, str] = {}
    with resources.write() as session:
        for user, role in ROLES.items():
            for namespace in (PRIVATE, PUBLIC):
                namespaces.set_member(session, HOST, namespace, user, role)
        namespaces.set_member(session, HOST, OTHER, "stranger", Role.ADMIN)
        namespaces.set_member(session, HOST, EVERYWHERE, "operator", Role.ADMIN)
        for caller in CALLERS[1:]:
            user = "operator" if caller in ("revoked", "expired", "narrowed") else caller
            scope = {OTHER: Role.READER} if caller == "narrowed" else {EVERYWHERE: Role.ADMIN}
            lifetime = timedelta(seconds=1) if caller == "expired" else None
            row, secrets[caller] = tokens.create(session, HOST, NewToken(user, caller, scope, lifetime))
            ids[caller] = row.id
            if caller == "revoked":
                tokens.revoke(session, HOST, row.id)
    return secrets, ids
