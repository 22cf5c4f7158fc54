"""Ctrl-C: ends any command within two seconds, with exit code 130 and one line.

The first interrupt raises KeyboardInterrupt. An import, a destructor or a long call into C may swallow or delay it: at
a second interrupt, or `PATIENCE_S` after the first, the process exits immediately. Every command survives that, as it
would survive a power cut."""

import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

INTERRUPTED = 130
PATIENCE_S = 1.5
_ONE_S = 0.5
"""Interrupts this close together count as one: a terminal signals the process group, and a parent may forward it."""
KEPT = {
    "promote": "nothing was moved, unless `adaptory history` shows it",
    "push": "sent files are kept; the same command sends the rest",
    "extract": "nothing was written; the same command starts again",
    "pull": "fetched files are kept; the same command fetches the rest",
    "merge": "the same command resumes with the shards that are finished",
    "eval": "measurements are kept; the same command continues from there",
    "base": "nothing was registered; repeat the command",
    "compose": "a later `adaptory compose` continues a composition that had begun; `adaptory cancel JOB` ends it",
    "conflicts": "nothing is kept; repeat the command",
}
"""What remains of an interrupted command, if the command does not say so itself."""


class Interrupts:
    """The interrupt state of the process. `raising`: KeyboardInterrupt will be caught.

    `kept`: what remains of the command, once it knows better than `KEPT`; a forced exit prints it too.
    """

    def __init__(self) -> None:
        self.raising = self.happened = self.said = False
        self.kept = ""
        self._last_s = 0.0

    def install(self) -> None:
        """Installs the handler, unless interrupts are ignored, as shells do for background processes."""
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            return
        signal.signal(signal.SIGINT, self._on_signal)
        sys.unraisablehook = _print_unless_interrupt

    def say(self, kept: str = "") -> None:
        """Prints the line, once."""
        if self.said:
            return
        self.said = True
        words = [word for word in sys.argv[1:] if not word.startswith("-")]
        kept = kept or self.kept or KEPT.get(words[0] if words else "", "")
        # While a bar is shown, sys.stderr is rich's, which would redraw the bar below the line.
        stream = getattr(sys.stderr, "rich_proxied_file", sys.stderr)
        clear = "\r\x1b[2K" if stream.isatty() else ""
        stream.write(f"{clear}interrupted: {kept}\n" if kept else f"{clear}interrupted\n")
        stream.flush()

    def end(self) -> None:
        """Exits the process immediately."""
        self.say()
        os._exit(INTERRUPTED)

    def wait_for_another(self, seconds: float) -> bool:
        """Checks whether another interrupt comes within `seconds`; the forced exit waits for `PATIENCE_S` more."""
        self.happened = False
        try:
            time.sleep(seconds)
        except KeyboardInterrupt:
            return True
        self._begin_to_wait()
        return False

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        if self.happened and self.raising and time.monotonic() - self._last_s < _ONE_S:
            return
        if self.happened or not self.raising:
            self.end()
        self._begin_to_wait()
        raise KeyboardInterrupt

    def _begin_to_wait(self) -> None:
        self.happened, self._last_s = True, time.monotonic()
        threading.Thread(target=self._end_when_late, args=(self._last_s,), name="interrupt", daemon=True).start()

    def _end_when_late(self, begun_s: float) -> None:
        time.sleep(PATIENCE_S)
        if self.happened and self._last_s == begun_s:
            self.end()


def _print_unless_interrupt(unraisable: Any) -> None:
    """Prints what a destructor raised, but not the interrupt that it swallowed: the process ends by `PATIENCE_S`."""
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)


interrupts = Interrupts()
