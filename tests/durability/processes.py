"""Processes to kill: a server, its client, a collector beside them. They are forked, so that they restart within a few
milliseconds: a hundred kills then take a minute. Each is ended by SIGKILL at any point, without a warning."""

import json
import os
import random
import signal
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from registry.client.api import Api, line_path
from registry.client.push import push
from registry.environment.settings import Settings
from registry.errors import Conflict, NotFound, Refused, Stale, TooMany, Unavailable
from registry.formats.references import RepositoryName
from registry.transfer.collect import collect as collect_garbage
from registry.transfer.resources import Resources, open_resources
from tests.durability.small import adapter_files

NAME = RepositoryName("acme", "sql")
CHANNEL = f"{line_path(NAME)}/channels/prod"


def kill(process: BaseProcess) -> None:
    assert process.pid is not None
    assert process.is_alive(), f"process {process.pid} died by itself with {process.exitcode}"
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def resources() -> Resources:
    return open_resources(Settings())


def serve(port: int) -> None:
    import uvicorn

    from registry.api.app import create_app

    uvicorn.run(create_app(resources()), host="127.0.0.1", port=port, log_level="error")


def collect_forever() -> None:
    """Collects without any grace period: announcements alone protect a push."""
    held = resources()
    while True:
        try:
            collect_garbage(held, grace=timedelta(0))
        except (Unavailable, Conflict):  # unavailable; or the killed one has not been noticed yet
            time.sleep(0.05)


@dataclass
class Journal:
    """The client's intentions and the answers that it received: lines that outlive it."""

    path: Path

    def note(self, state: str, act: Mapping[str, Any]) -> None:
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(handle, (json.dumps({"state": state, **act}) + "\n").encode())
        os.close(handle)

    def read(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    @property
    def done(self) -> list[dict[str, Any]]:
        return [line for line in self.read() if line["state"] == "done"]


def work(url: str, journal_path: str, directory: str, seed: int) -> None:
    """Repeats the act during which it died, then continues with random acts."""
    client = _Client(Api(url), Journal(Path(journal_path)), Path(directory), random.Random(seed))
    lines = client.journal.read()
    if lines and lines[-1]["state"] in ("begin", "again"):
        client.do({key: value for key, value in lines[-1].items() if key not in ("state", "code", "detail")})
    while True:
        client.do(client.next_act())


@dataclass
class _Client:
    api: Api
    journal: Journal
    directory: Path
    random: random.Random

    def next_act(self) -> dict[str, Any]:
        pushed = [line["minor"] for line in self.journal.done if line["act"] == "push"]
        kind = self.random.choice(["push", "push", "promote", "rollback", "yank", "unyank"]) if pushed else "push"
        if kind == "push":
            minor = 1 + max((line["minor"] for line in self.journal.read() if line["act"] == "push"), default=0)
            return {"act": "push", "minor": minor}
        if kind == "rollback":
            return {"act": "rollback", "etag": self._etag()}
        return {"act": kind, "minor": self.random.choice(pushed[-8:])}

    def do(self, act: dict[str, Any]) -> None:
        """Repeats until the registry has answered: it may be down, since it is killed too."""
        self.journal.note("begin", act)
        while True:
            try:
                answer = self._ask(act)
            except (Unavailable, TooMany) as error:
                self.journal.note("again", {**act, "code": error.code, "detail": error.detail})
                time.sleep(0.02)
            except (Refused, Stale, Conflict, NotFound) as error:
                if error.code in ("upload_unknown", "upload_incomplete"):  # it expired while the server was down
                    self.journal.note("again", {**act, "code": error.code, "detail": error.detail})
                    continue
                self.journal.note("refused", {**act, "code": error.code})
                return
            else:
                self.journal.note("done", {**act, **answer})
                return

    def _ask(self, act: dict[str, Any]) -> dict[str, Any]:
        if act["act"] == "push":
            return self._push(act["minor"])
        if act["act"] == "promote":
            body = {"version": f"1.{act['minor']}.0"}
            return {"move": self.api.put(CHANNEL, body)["id"]}
        if act["act"] == "rollback":
            move = self.api.post(f"{CHANNEL}/rollback", {}, headers={"If-Match": act["etag"]})
            return {"move": move["id"]}
        release = f"{line_path(NAME)}/releases/1.{act['minor']}.0"
        self.api.post(f"{release}/{act['act']}", {"reason": "because"})
        return {}

    def _push(self, minor: int) -> dict[str, Any]:
        files = adapter_files(self.directory / str(minor), minor)
        request = {"version": f"1.{minor}.0", "base": "tiny"}
        answer, _ = push(self.api, files, NAME, "adapter", request, lambda _count: None)
        return {"commit": answer.release.commit}

    def _etag(self) -> str:
        while True:
            try:
                return f'"{self.api.get(CHANNEL)["move"]}"'
            except NotFound:
                return '"1"'  # nothing was promoted yet, so a rollback has no target
            except Unavailable:
                time.sleep(0.02)


def wait_for_port(port: int) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.01)
    raise AssertionError(f"nothing listens on {port}")
