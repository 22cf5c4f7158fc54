"""The console's entry point: ready for an interrupt, and for a fast start and end, before anything heavy is imported."""

import atexit
import gc
import os
import signal
import sys
from types import FrameType

INTERRUPTED = 130
OBJECTS_TO_COLLECT = 50_000
"""New objects after which cycles are looked for (700 in a plain interpreter). Importing torch makes 170,000 that stay:
looking through them time and again took 0.2 s of its 1.4."""


def main() -> None:
    gc.set_threshold(OBJECTS_TO_COLLECT)
    atexit.register(gc.freeze)  # what lives to the end is freed by the end: to look for cycles in it took 0.4 s
    signal.signal(signal.SIGINT, _end_at_once)
    from registry.cli.main import main as run

    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        run()
    finally:
        signal.signal(signal.SIGINT, _end_at_once)


def _end_at_once(_number: int, _frame: FrameType | None) -> None:
    """While modules are imported, and when all is done, there is nothing to hand back and nobody to catch an exception."""
    sys.stderr.write("interrupted\n")
    sys.stderr.flush()
    os._exit(INTERRUPTED)
