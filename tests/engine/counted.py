"""Tasks whose runs can be counted afterwards: each writes a line at its beginning and one at its end."""

import json
import logging
import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

from registry.errors import Invalid
from registry.worker.engine.units import Count, HostNode, Node, Result, Task, Unit, always_intact
from tests.eventually import eventually

log = logging.getLogger(__name__)


def note(unit: Unit, event: str) -> None:
    """Appends a line that outlives this process."""
    file = os.open(str(unit.hints["journal"]), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, f"{event} {unit.name}\n".encode())
    os.close(file)


def _lines(unit: Unit) -> list[str]:
    return Path(unit.hints["journal"]).read_text().splitlines()


def events(journal: Path) -> Counter[str]:
    """The number of times that each event of each unit happened, such as `done unit 3`."""
    return Counter(journal.read_text().splitlines()) if journal.exists() else Counter()


def double(_node: Node, unit: Unit, _count: Count) -> Result:
    """Doubles its number; ends only when `beside` units have begun, since processes start slowly."""
    note(unit, "begun")
    beside = unit.hints.get("beside", 0)
    eventually(lambda: sum(line.startswith("begun") for line in _lines(unit)) >= beside, every_s=0.02)
    time.sleep(float(unit.hints.get("seconds", 0)))
    note(unit, "done")
    return {"number": 2 * unit.content["number"], "process": os.getpid()}


def die(node: Node, unit: Unit, _count: Count) -> Result:
    """Keeps its result, and dies before its answer is sent."""
    note(unit, "begun")
    assert isinstance(node, HostNode)
    node.results.write(DIE.key(unit), json.dumps({"result": {"number": unit.content["number"]}}).encode())
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("a process outlives SIGKILL")


def fail(_node: Node, unit: Unit, _count: Count) -> Result:
    """Fails as units can: by an error of ours, by a defect, by the end of its process."""
    note(unit, "begun")
    how: Any = unit.content.get("how")
    for line in range(300):
        log.warning("line %d", line)
    if how == "refused":
        raise Invalid("pickle", "it is a pickle.", subject="model.bin", next_step="Convert it.")
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise ZeroDivisionError("of a defect")


DOUBLE = Task(name="double", version=1, run=double, intact=always_intact)
DIE = Task(name="die", version=1, run=die, intact=always_intact)
FAIL = Task(name="fail", version=1, run=fail, intact=always_intact)


def units(count: int, journal: Path, seconds: float = 0.0, beside: int = 0) -> list[Unit]:
    """Units that double their number."""
    hints = {"journal": str(journal), "seconds": seconds, "beside": beside}
    return [Unit(name=f"unit {number}", content={"number": number}, hints=hints) for number in range(count)]
