"""One search over 10,000 releases on SQLite and one channel resolved: the SQL alone, in process, and over HTTP.

The search asks for a base, a maximum rank, a set of targets and a score, and gets a page of 50. The floor is a FastAPI
route that reads one row by its key, served and called the same way. Clients are threads of this process, which takes
CPU time from the server: throughput is what both get together.
"""

import http.client
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlencode

from sqlalchemy import event

from benchmarks import floor, harness, stock
from benchmarks.harness import Case, Sample
from registry import resolve, search
from registry.client.api import Api
from registry.client.inprocess import InProcessTransport
from registry.names import parse_reference
from registry.resources import Resources, open_resources
from registry.search import Query
from registry.settings import Settings
from registry.suites import parse_condition
from registry.web.app import create_app

RELEASES = 10_000
BASE, MAX_RANK, TARGETS = stock.BASES[0], 16, ("q_proj", "v_proj")
COMMON, RARE = "sql-exact.accuracy>=0.5", "sql-exact.accuracy>=0.99"
REFERENCE = f"{stock.repository_name(17)}@{stock.CHANNEL}"
CLIENTS = (1, 8)
START_S = 60


def main() -> None:
    chosen = harness.options(__doc__, rounds=15)
    count, seconds = (20, 0.5) if chosen.quick else (100, 2.0)
    harness.announce("search", "sqlalchemy", "fastapi", "pydantic", "uvicorn")
    with TemporaryDirectory(prefix="bench-search-") as directory, ExitStack() as stack:
        home = Path(directory)
        resources = open_resources(Settings(home=home))
        stack.callback(resources.close)
        stock.fill(resources, chosen.base, RELEASES)
        _describe(resources, home)
        show_plan(resources)
        _report("the SQL alone", _verbs(resources), "floor", chosen.rounds, count)
        with ExitStack() as inside:
            cases = _in_process(resources, inside)
            _report("in process", cases, "floor", chosen.rounds, count)
        served = stack.enter_context(_server(home, resources))
        _report("over HTTP", _over_http(served, stack), "floor", chosen.rounds, count)
        _throughput(served, max(2, chosen.rounds // 3), seconds)


def _report(where: str, calls: Mapping[str, Callable[[], object]], base: str, rounds: int, count: int) -> None:
    def case(call: Callable[[], object]) -> Case:
        return lambda: harness.calls(call, count)

    results = harness.interleave({name: case(call) for name, call in calls.items()}, rounds)
    harness.report(f"One at a time, {where}, {count} calls a round", results, base, "ms")
