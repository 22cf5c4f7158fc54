"""kill -9 of server, client and collector at random moments: nothing that was acknowledged is lost, nothing is torn."""

import os
import random
import time
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from registry.database.tables import Move, Release
from tests import services
from tests.doses import further
from tests.durability.conftest import broken_promises, opened
from tests.durability.processes import Journal, collect_forever, kill, serve, wait_for_port, work
from tests.forked import start

LONGEST_LIFE_S = {"sqlite": 0.4, "postgresql": 1.0}
"""The duration of an act on an idle machine, with a margin: with S3 a push is a dozen requests."""


@pytest.mark.on("PostgreSQL")
@pytest.mark.parametrize("kills", [6, *further(100)])
def test_many_kills_lose_nothing_and_leave_nothing_torn(
    environ: dict[str, str], tmp_path: Path, record_property: Callable[[str, object], None], kills: int
) -> None:
    seed = int(os.environ.get("ADAPTORY_TEST_SEED", random.SystemRandom().randrange(10**6)))
    record_property("ADAPTORY_TEST_SEED", seed)
    chance = random.Random(seed)
    environ |= {"ADAPTORY_UPLOAD_EXPIRES_S": "15"}  # so that there is garbage to collect, but no upload in progress
    port, journal = services.free_port(), Journal(tmp_path / "journal")
    url = f"http://127.0.0.1:{port}"

    def begin(role: str) -> BaseProcess:
        if role == "server":
            return start(serve, environ, port)
        if role == "collector":
            return start(collect_forever, environ)
        return start(work, environ, url, str(journal.path), str(tmp_path / "adapters"), chance.randrange(10**6))

    alive = {"server": begin("server")}
    wait_for_port(port)
    alive["client"] = begin("client")
    longest_s = LONGEST_LIFE_S["postgresql" if "ADAPTORY_DATABASE_URL" in environ else "sqlite"]
    first_push_s = _first_push_s(journal)
    longest_s = max(longest_s, first_push_s)  # on a busy machine almost none would finish otherwise
    record_property("first_push_s", first_push_s)
    alive["collector"] = begin("collector")
    for number in range(kills):
        time.sleep(chance.uniform(0.02, longest_s))
        victim = chance.choices(["server", "client", "collector"], [4, 4, 2])[0]
        kill(alive[victim])
        if number % 20 == 19 or number == kills - 1:
            assert broken_promises(environ) == [], f"after {number + 1} kills, the last of the {victim}; seed {seed}"
            if len(_pushes(journal)) <= (number + 1) / 10:
                longest_s *= 2  # it has become busier since
        alive[victim] = begin(victim)
        if victim == "server":
            wait_for_port(port)
    _let_one_more_act_end(journal, alive)
    for process in alive.values():
        kill(process)
    assert broken_promises(environ, read_bytes=True) == []
    assert len(_pushes(journal)) > kills / 20
    _assert_nothing_acknowledged_is_lost(environ, journal)


def _first_push_s(journal: Journal) -> float:
    """The client's time from its start to the end of its first act, a push."""
    started = time.monotonic()
    while not _pushes(journal):
        assert time.monotonic() < started + 60, journal.read()[-5:]
        time.sleep(0.01)
    return time.monotonic() - started


def _pushes(journal: Journal) -> list[dict[str, Any]]:
    return [act for act in journal.done if act["act"] == "push"]


def _let_one_more_act_end(journal: Journal, alive: Mapping[str, BaseProcess]) -> None:
    """The last interrupted act can be repeated."""
    before, deadline = len(journal.done), time.monotonic() + 30
    while len(journal.done) < before + 2:
        assert [role for role, process in alive.items() if not process.is_alive()] == []
        assert time.monotonic() < deadline, journal.read()[-5:]
        time.sleep(0.05)


def _assert_nothing_acknowledged_is_lost(environ: Mapping[str, str], journal: Journal) -> None:
    done = journal.done
    resources = opened(environ)
    with resources.read() as session:
        releases = {release.version: release for release in session.scalars(select(Release))}
        moves = {move.id: move.to_release.version for move in session.scalars(select(Move))}
        for act in done:
            version = f"1.{act['minor']}.0" if "minor" in act else None
            if act["act"] == "push":
                assert releases[str(version)].revision.commit == act["commit"]
            elif act["act"] == "promote":
                assert moves[act["move"]] == version
            elif act["act"] == "rollback":
                assert act["move"] in moves
        for version, yanked in _last_yanks(journal).items():
            assert releases[version].yanked == yanked, version
    resources.close()


def _last_yanks(journal: Journal) -> dict[str, bool]:
    """Whether each version must be yanked now; leaves out versions whose last yank was never answered."""
    complete: dict[str, bool] = {}
    for line in journal.read():
        if line["act"] in ("yank", "unyank"):
            version = f"1.{line['minor']}.0"
            if line["state"] == "done":
                complete[version] = line["act"] == "yank"
            else:
                complete.pop(version, None)
    return complete
