"""SIGKILL of a node and of the driver at random moments: finished work is not repeated."""

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from registry.environment.settings import Settings
from registry.worker.engine.units import HostNode, Unit, open_node
from tests.engine import counted
from tests.engine.cluster import REPOSITORY, RayCluster

LONGEST_LIFE_S = 4.0
SECONDS = 0.4
PER_KILL = 8
"""Units for each kill, so that some are left when the last one comes."""


@pytest.fixture
def doomed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    started = RayCluster({"ADAPTORY_HOME": str(tmp_path_factory.mktemp("home"))})
    try:
        started.start(cpus=1)
        started.start(cpus=1)
        yield started
    finally:
        started.stop()


@pytest.mark.long
@pytest.mark.parametrize("kills", [50])
def test_units_that_were_finished_survive_the_death_of_a_node_and_of_the_driver(
    doomed: RayCluster, tmp_path: Path, record_property: Callable[[str, object], None], kills: int
) -> None:
    seed = int(os.environ.get("ADAPTORY_TEST_SEED", random.SystemRandom().randrange(10**6)))
    record_property("ADAPTORY_TEST_SEED", seed)
    chance, journal, ended = random.Random(seed), tmp_path / "journal", tmp_path / "ended"
    count = PER_KILL * kills
    settings = Settings(home=Path(doomed.environ["ADAPTORY_HOME"]))
    node, units = open_node(settings), counted.units(count, journal, SECONDS)
    kept: dict[str, bytes] = {}
    driver = _driver(doomed, journal, count, ended)
    for number in range(kills):
        time.sleep(chance.uniform(0.2, LONGEST_LIFE_S))
        kept |= _finished(node, units)
        if (number + chance.randrange(2)) % 2:
            driver.kill()
            driver.wait()
            driver = _driver(doomed, journal, count, ended)
        else:
            doomed.kill(doomed.nodes[1])
            doomed.start(cpus=1)
    assert driver.wait(timeout=120) == 0, seed
    assert int(ended.read_text()) == count * (count - 1)
    after, events = _finished(node, units), counted.events(journal)
    assert {name: after[name] for name in kept} == kept, f"a finished unit was done again; seed {seed}"
    twice = sorted(unit.name for unit in units if events[f"done {unit.name}"] > 1)
    lost = sum(events[f"begun {unit.name}"] - 1 for unit in units)
    record_property("begun again", lost)
    assert len(twice) <= kills, "only one whose result was being written when its process died"
    assert lost <= 2 * kills, f"each death costs at most what two processes were doing; seed {seed}"


def _finished(node: HostNode, units: list[Unit]) -> dict[str, bytes]:
    """The stored result of each finished unit: its maker and time; another run would differ."""
    read = {unit.name: node.results.read(counted.DOUBLE.key(unit)) for unit in units}
    return {name: content for name, content in read.items() if content is not None}


def _driver(cluster: RayCluster, journal: Path, count: int, ended: Path) -> "subprocess.Popen[bytes]":
    own = {name: value for name, value in os.environ.items() if not name.startswith(("ADAPTORY_", "RAY_"))}
    command = [sys.executable, "-m", "tests.engine.driver", str(journal), str(count), str(SECONDS), str(ended)]
    environ = {**own, **cluster.environ, **cluster.driver_environ}
    return subprocess.Popen(command, env=environ, cwd=REPOSITORY)
