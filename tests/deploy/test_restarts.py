"""Servers and workers are replaced one after the other while clients go on."""

import itertools
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from registry.client.api import Api, line_path
from registry.client.push import push
from registry.formats.references import RepositoryName
from tests import pgbouncer, services
from tests.deploy.stack import Stack
from tests.durability.small import adapter_files, write_adapter, write_base
from tests.eventually import eventually
from tests.ports import free_ports
from tests.scenarios.world import Cli

NAME = RepositoryName("acme", "sql")
LINE = line_path(NAME)
RELEASES = 6
PAIRS = list(itertools.combinations(range(RELEASES), 2))


@pytest.fixture
def environ(pairing: dict[str, str], tmp_path: Path) -> dict[str, str]:
    return registry_of(pairing, tmp_path)


def registry_of(pairing: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """The environment of a registry with a base."""
    variables = {"ADAPTORY_HOME": str(tmp_path / "home"), "ADAPTORY_USER": "mia", **pairing}
    Cli(variables).ok("base", "add", write_base(tmp_path / "base"), "--name", "tiny")
    return variables


@pytest.mark.long
@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_server_that_is_asked_to_stop_says_so_first_and_answers_until_it_does(
    environ: dict[str, str], tmp_path: Path, processes: str
) -> None:
    with Stack(tmp_path, environ) as stack, httpx2.Client(timeout=20) as client:
        server = stack.server(services.free_port(), "--processes", processes, ADAPTORY_DRAIN_S="3")
        assert "connection" not in client.get(f"{server.url}/v1/bases/tiny").headers
        began = time.monotonic()
        server.ask_to_stop()
        eventually(lambda: client.get(f"{server.url}/readyz").status_code == 503)
        problem = client.get(f"{server.url}/readyz").json()
        answered = client.get(f"{server.url}/v1/bases/tiny")
        assert (problem["code"], answered.status_code) == ("stopping", 200)
        assert answered.headers["connection"] == "close"
        assert client.get(f"{server.url}/healthz").status_code == 200
        assert server.stopped() == 0
        assert time.monotonic() - began >= 3


class Load:
    """Clients that run until they are stopped; records failures, and the number of successes of each act."""

    def __init__(self, url: str, trust: ssl.SSLContext, directory: Path) -> None:
        self._url, self._trust, self._directory = url, trust, directory
        self._stop = threading.Event()
        self.failures: list[str] = []
        self.counts: dict[str, int] = {}
        self.checks: list[int] = []
        acts = (self._push, self._write, self._read, self._download, self._request_conflicts)
        self.names = [act.__name__ for act in acts]
        self._threads = [threading.Thread(target=self._repeat, args=(act,)) for act in acts]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _repeat(self, act: Callable[[httpx2.Client, int], None]) -> None:
        with httpx2.Client(base_url=self._url, verify=self._trust, timeout=60) as client:
            for turn in itertools.count():
                if self._stop.is_set():
                    return
                try:
                    act(client, turn)
                except Exception as error:  # every one is a failed request
                    self.failures.append(f"{act.__name__}: {type(error).__name__} {error}")
                self.counts[act.__name__] = turn + 1

    def _push(self, _client: httpx2.Client, turn: int) -> None:
        version = f"1.{100 + turn}.0"
        files = adapter_files(self._directory / version, 100 + turn)
        api = Api(self._url, httpx2.HTTPTransport(verify=self._trust))
        push(api, files, NAME, "adapter", {"version": version, "base": "tiny"}, lambda _count: None)
        api.close()

    def _write(self, client: httpx2.Client, turn: int) -> None:
        """No request is sent twice, so that failures are visible."""
        examples = [{"prompt": f"{turn}", "completion": "b"}]
        suite = {"name": f"suite-{turn}", "kind": "target", "chat": False, "examples": examples}
        ok(client.post("/v1/suites", json=suite))
        ok(client.put(f"{LINE}/channels/prod", json={"version": f"1.{turn % 2}.0"}))

    def _read(self, client: httpx2.Client, _turn: int) -> None:
        for path in ("/v1/resolve?ref=acme/sql:1.0.0", "/v1/releases?text=sql", f"{LINE}/releases/1.0.0"):
            ok(client.get(path))

    def _download(self, client: httpx2.Client, _turn: int) -> None:
        for file in ok(client.get(f"{LINE}/releases/1.0.0")).json()["files"]:
            answer = client.get(f"{LINE}/releases/1.0.0/files/{file['path']}", follow_redirects=True)
            assert len(ok(answer).content) == file["size_bytes"]

    def _request_conflicts(self, client: httpx2.Client, turn: int) -> None:
        """A job for the workers: each pair of releases once."""
        if turn >= len(PAIRS):
            time.sleep(0.05)
            return
        inputs = [{"adapter": f"acme/sql:1.{number}.0"} for number in PAIRS[turn]]
        self.checks.append(ok(client.post("/v1/conflicts", json={"inputs": inputs})).json()["id"])


def ok(answer: httpx2.Response) -> httpx2.Response:
    assert answer.status_code < 400, f"{answer.request.url} {answer.status_code} {answer.text[:300]}"
    return answer


@pytest.mark.long
def test_servers_and_workers_are_replaced_without_a_failed_request(environ: dict[str, str], tmp_path: Path) -> None:
    are_replaced(environ, environ, tmp_path)


@pytest.mark.long
def test_servers_and_workers_behind_pgbouncer_are_replaced_without_a_failed_request(tmp_path: Path) -> None:
    direct = registry_of(services.pairing(services.PAIRINGS[1]), tmp_path)
    with pgbouncer.before(direct["ADAPTORY_DATABASE_URL"]) as url:
        are_replaced(direct, direct | {"ADAPTORY_DATABASE_URL": url}, tmp_path)


def are_replaced(direct: dict[str, str], environ: dict[str, str], tmp_path: Path) -> None:
    """Replaces them one after the other. Servers and workers have the environment; other commands connect directly."""
    cli = Cli(direct)
    for number in range(RELEASES):
        adapter = write_adapter(tmp_path / str(number), number)
        cli.ok("push", adapter, f"acme/sql:1.{number}.0", "--base", "tiny")
    ports = free_ports(2)
    with Stack(tmp_path, environ | {"ADAPTORY_DRAIN_S": "3", "ADAPTORY_TRUSTED_PROXIES": "127.0.0.1"}) as stack:
        servers, workers = [stack.server(port) for port in ports], [stack.worker() for _ in range(2)]
        # It tries no other server, like the balancers of most clusters: only draining keeps requests from failing.
        proxy = stack.proxy(*ports, ADAPTORY_TRY_FOR="0s")
        with Load(proxy.url, stack.trust, tmp_path / "pushed") as load:
            for index, port in enumerate(ports):
                go_on(load)
                servers[index].ask_to_stop()
                workers[index].ask_to_stop()
                assert (servers[index].stopped(), workers[index].stopped()) == (0, 0)
                go_on(load)
                servers[index], workers[index] = stack.server(port), stack.worker()
            go_on(load)
            eventually(lambda: len(load.checks) == len(PAIRS))
        assert load.failures == []
        assert all(count >= 5 for count in load.counts.values()), load.counts
        with httpx2.Client(base_url=proxy.url, verify=stack.trust) as client:
            for check in load.checks:
                state = eventually(lambda check=check: _ended(ok(client.get(f"/v1/conflicts/{check}")).json()))
                assert state == "done"
            pushed = ok(client.get(f"{LINE}/releases?limit=500")).json()["items"]
    assert len(pushed) == RELEASES + load.counts["_push"]
    assert cli("fsck", "--full").code == 0


@pytest.mark.long
def test_the_proxy_holds_requests_until_the_only_server_is_back(environ: dict[str, str], tmp_path: Path) -> None:
    """Configured as in compose.yaml."""
    for number in range(RELEASES):
        adapter = write_adapter(tmp_path / str(number), number)
        Cli(environ).ok("push", adapter, f"acme/sql:1.{number}.0", "--base", "tiny")
    port = services.free_port()
    with Stack(tmp_path, environ) as stack:
        server = stack.server(port)
        proxy = stack.proxy(port, ADAPTORY_TRY_FOR="60s")
        with Load(proxy.url, stack.trust, tmp_path / "pushed") as load:
            go_on(load)
            server.ask_to_stop()
            assert server.stopped() == 0
            time.sleep(2)
            stack.server(port)
            go_on(load)
        assert load.failures == []


def go_on(load: Load) -> None:
    """Lets every client do some more."""
    seen = dict(load.counts)
    eventually(lambda: load.failures or all(load.counts.get(name, 0) > seen.get(name, 0) + 1 for name in load.names))


def _ended(check: dict[str, Any]) -> str:
    return check["state"] if check["state"] not in ("queued", "running") else ""
