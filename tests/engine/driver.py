"""A driver that a test can kill: maps counted units, and writes the last line when all have ended."""

import sys
from pathlib import Path

from registry.environment.settings import Settings
from registry.transfer.resources import open_store
from registry.worker.engine.opened import WorkerEngine
from registry.worker.engine.protocol import Needs
from tests.engine import counted


def main(journal: str, count: str, seconds: str, ended: str) -> None:
    engine = WorkerEngine(Settings(), open_store(Settings(), None))
    units = counted.units(int(count), Path(journal), float(seconds))
    results = [result for _, result in engine.map(counted.DOUBLE, units, Needs(), lambda _done: None)]
    Path(ended).write_text(str(sum(result["number"] for result in results)))
    engine.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
