"""Fixtures for every test: a tiny real model with adapters, databases, and a registry driven as its users do."""

import gc
import os
import re
import ssl
from collections import defaultdict
from collections.abc import Generator, Sequence
from functools import lru_cache, partial
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import boto3
import botocore.session
import jinja2
import pytest
import torch
import typer.main
from hypothesis import HealthCheck, settings

import registry.api.app
import registry.client.api
import registry.storage.s3.store
import registry.transfer.resources
import registry.worker.engine.template
from registry.cli.start import OBJECTS_TO_COLLECT
from registry.database.engine import Database
from registry.environment.settings import S3Storage
from registry.storage.s3.bucket import Bucket, open_bucket
from tests import forked, s3_server, second_device, services
from tests.s3_server import S3Server

# 770,000 objects last as long as the tests do: scanning them again and again took a sixth of their time.
gc.set_threshold(OBJECTS_TO_COLLECT)
# A server configured in this shell is not meant for the tests.
for _name in [name for name in os.environ if name.startswith("ADAPTORY_")]:
    if not _name.startswith(("ADAPTORY_TEST_", "ADAPTORY_REQUIRE_", "ADAPTORY_SNAPSHOTS")):
        del os.environ[_name]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Several test processes share the cores: threads that wait for each other's small matrices took 80 % of the time.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
# Slow generation of inputs shows a busy machine or cold imports: it fails no test.
settings.register_profile("house", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("house")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where tests of tensor code compute: cpu, cuda, cuda:N or second")
    parser.addoption("--screenshots", metavar="HOME", help="take the documentation's pictures, of a demo's registry")


WITHOUT_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(params=[second_device.NAME, pytest.param("cuda", marks=[pytest.mark.cuda, WITHOUT_CUDA])])
def accelerator(request: pytest.FixtureRequest) -> str:
    """A device to compare with the CPU: one that every machine has, and a GPU if there is one."""
    second_device.register()
    return request.param


def pytest_configure(config: pytest.Config) -> None:
    """The process that outlives the others owns the services; test processes started by it inherit their directory."""
    os.environ["ADAPTORY_TEST_DEVICE"] = str(config.getoption("--device"))  # read by tests/device.py
    if not hasattr(config, "workerinput"):
        os.environ[services.DIRECTORY] = str(services.new_directory())
        if config.option.basetemp is None:
            config.option.basetemp = services.shared_directory() / "t"  # short: some paths have to fit a line
        if config.getoption("numprocesses", None):
            forked.share()


def pytest_unconfigure(config: pytest.Config) -> None:
    directory = os.environ.get(services.DIRECTORY)
    if directory and not hasattr(config, "workerinput"):
        services.remove(Path(directory))


TESTS = Path(__file__).parent
WAY = re.compile(rf"(?<=[\[-])({'|'.join(('embedded', *services.PAIRINGS, *services.DATABASES))})(?=[\]-])")
"""The part of a test's name that tells its way of running a registry, or its database."""
ON_BOTH_DATABASES = (
    "test_prepared.py",
    "test_directions.py",
    "test_the_migrated_schema_has_no_difference_from_the_models",
)
"""Files and tests of SQL that the two databases are sent in different words."""


SLOWEST_FIRST = (
    "engine", "browser", "durability", "serving", "scenarios", "tutorials", "access", "fuzz", "registry",
    "wire", "deploy", "house", "examples", "composer",
)  # fmt: skip
"""Tests that take minutes come before those that take milliseconds, which occupy all processes until the end."""

TOGETHER = (
    *("test_pages_in_a_browser.py", "test_hub_clients.py", "test_query_plans.py", "test_search_as_a_model.py"),
    *("test_tutorials.py", "test_ray.py", "test_house.py", "test_next_steps.py"),
)
"""What these tests share takes longer than the tests: they stay in one process."""


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Generator[None]:
    _mark_further_ways(items)
    yield
    items.sort(key=lambda item: SLOWEST_FIRST.index(item.path.relative_to(TESTS).parts[0]))
    # Each test process begins with a contiguous part of the list: distribute the slow tests over all.
    processes = getattr(config, "workerinput", {"workercount": 1})["workercount"]
    hands = [list(hand) for _, hand in groupby(items, lambda item: item.path if item.path.name in TOGETHER else item)]
    items[:] = [item for first in range(processes) for hand in hands[first::processes] for item in hand]


def pytest_collection_finish() -> None:
    gc.freeze()


def _mark_further_ways(items: list[pytest.Item]) -> None:
    """By default a test that can run in several ways runs in one; the others are `long`. The default is the first,
    which needs no service, unless the test has a mark such as `pytest.mark.on("PostgreSQL")`: PostgreSQL and S3 need
    four times the CPU."""
    ways: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("long"):
            continue  # chosen from the other ways, or the test might not run by default at all
        if not {item.path.name, getattr(item, "originalname", "")}.isdisjoint(ON_BOTH_DATABASES):
            continue
        ways[WAY.sub("", item.nodeid)].append(item)
    for several in ways.values():
        del several[_default_way(several)]
        for item in several:
            item.add_marker(pytest.mark.long)


def _default_way(several: Sequence[pytest.Item]) -> int:
    """The index of the way that runs by default."""
    mark = several[0].get_closest_marker("on")
    if mark is None or len(several) == 1:
        return 0
    runs = [
        way is not None and way[1].startswith(mark.args[0])
        for way in map(WAY.search, (item.nodeid for item in several))
    ]
    return runs.index(True)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Passes the list of missing services from a test process to the process that prints the summary."""
    services.add_missing(getattr(node, "workeroutput", {}).get("missing", {}))


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["missing"] = services.missing()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for name, hint in services.missing().items():
        terminalreporter.write_line(f"NOT TESTED: {name} ({hint})", yellow=True)


@pytest.fixture(scope="session", autouse=True)
def _read_once() -> Generator[None]:  # pyright: ignore[reportUnusedFunction]
    """Caches work that a command does once per process: building its options, reading boto3's 2 MB description of S3
    and the machine's certificates, compiling SQL; and once per registry: migrating. One process runs thousands of
    commands here; this took half of the time of the shorter ones."""
    forked.remember()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.main, "get_command", lru_cache(typer.main.get_command))
        patch.setattr(botocore.session, "create_loader", lru_cache(botocore.session.create_loader))
        for module in (registry.api.app, registry.client.api):
            patch.setattr(module, "version", lru_cache(version))
        patch.setattr(boto3, "Session", _s3_session)
        copied = partial(services.ensure_schema_by_copy, services.shared_directory())
        patch.setattr(registry.transfer.resources, "ensure_schema", copied)
        patch.setattr(registry.worker.engine.template, "launch", forked.launch_template)
        patch.setattr(registry.storage.s3.store, "open_bucket", partial(_bucket, services.shared_directory() / "s3"))
        patch.setattr(jinja2, "Template", lru_cache(jinja2.Template))  # PEFT writes a card beside each adapter
        patch.setattr(ssl, "create_default_context", lru_cache(ssl.create_default_context))
        services.share_statements(partial(patch.setattr, raising=False))
        yield


def _s3_session() -> boto3.Session:
    return _s3_session_for(tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_"))))


def _bucket(shared: Path, storage: S3Storage) -> Bucket:
    """One client for the run's store; other stores are stopped and killed, and so are their connections."""
    if storage.endpoint_url == s3_server.load(shared).endpoint:
        return _bucket_for(
            storage.model_dump_json(), tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
        )
    return open_bucket(storage)


@lru_cache
def _bucket_for(storage: str, _environment: tuple[tuple[str, str], ...]) -> Bucket:
    return open_bucket(S3Storage.model_validate_json(storage))


@lru_cache
def _s3_session_for(_environment: tuple[tuple[str, str], ...]) -> boto3.Session:
    return _NewSession()


_NewSession = boto3.Session


@pytest.fixture(scope="session")
def postgres_url() -> str:
    return services.shared_postgres()


@pytest.fixture(scope="module", autouse=True)
def databases_of_the_module() -> Generator[None]:
    with services.dropped_databases():
        yield


@pytest.fixture(autouse=True)
def databases_of_the_test() -> Generator[None]:
    with services.dropped_databases():
        yield


@pytest.fixture(params=services.PAIRINGS)
def pairing(request: pytest.FixtureRequest) -> dict[str, str]:
    """The environment of an empty registry's database and store, of each kind that we support together."""
    return services.pairing(request.param)


@pytest.fixture(scope="module", params=services.DATABASES)
def migrated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Generator[Database]:
    """A database of each kind with our tables, shared by the tests of a module."""
    directory = tmp_path_factory.mktemp("migrated")
    database = Database(services.new_database_of(request.param, directory, migrated=True))
    yield database
    database.close()


@pytest.fixture(scope="session")
def s3() -> S3Server:
    """The S3 server of this run, shared by every test."""
    return services.shared_s3()


@pytest.fixture(scope="module")
def own_s3(tmp_path_factory: pytest.TempPathFactory) -> Generator[S3Server]:
    """A server that no other module uses: it may be stopped, frozen and killed."""
    services.shared_s3()  # skips or fails where there is none
    own = S3Server(tmp_path_factory.mktemp("s3"))
    own.start()
    yield own
    own.stop()
