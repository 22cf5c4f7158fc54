"""Ctrl-C: ends a command within two seconds with exit code 130 and one line, whatever it is doing.

Python raises KeyboardInterrupt wherever the main thread is. That may be an import, whose module then fails in its own
way; a destructor, which prints and swallows it; or a long call into C, which ends when it ends. So the first interrupt
raises, and when the command has not ended `PATIENCE_S` later, or at a second interrupt, the process ends at once.
Every command is safe against that: it is what a power cut would do.
"""

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
"""Interrupts so close together are one: a terminal sends it to a whole group, and a parent may pass it on again."""
_DESTRUCTOR_S = 0.02
"""In which a destructor that an interrupt has ended has been left."""
KEPT = {
    "push": "what was sent is kept; the same command sends the rest",
    "pull": "what was fetched is kept; the same command fetches the rest",
    "merge": "the same command goes on with what is finished",
    "eval": "no score was recorded; give the command again",
    "base": "nothing was registered; give the command again",
    "compose": "the same command goes on with the shards that are finished; `adaptory jobs` shows the composition",
    "conflicts": "nothing was measured; give the command again",
}
"""What is left of an interrupted command, where the command itself does not say."""


class Interrupts:
    """The state of one process. `raising` says that there is somebody who catches a KeyboardInterrupt."""

    def __init__(self) -> None:
        self.raising = self.happened = self.said = False
        self._last_s = 0.0

    def install(self) -> None:
        """Does nothing where interrupts are ignored, as a shell has it for what it starts in the background."""
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            return
        signal.signal(signal.SIGINT, self._on_signal)
        sys.unraisablehook = self._on_unraisable

    def say(self, kept: str = "") -> None:
        """The one line, once."""
        if self.said:
            return
        self.said = True
        words = [word for word in sys.argv[1:] if not word.startswith("-")]
        kept = kept or KEPT.get(words[0] if words else "", "")
        # While a bar is shown, sys.stderr is rich's, which would draw the bar again below the line.
        stream = getattr(sys.stderr, "rich_proxied_file", sys.stderr)
        clear = "\r\x1b[2K" if stream.isatty() else ""
        stream.write(f"{clear}interrupted: {kept}\n" if kept else f"{clear}interrupted\n")
        stream.flush()

    def end(self) -> None:
        """Ends the process where it stands."""
        self.say()
        os._exit(INTERRUPTED)

    def wait_for_another(self, seconds: float) -> bool:
        """Whether another interrupt comes; the end is put off meanwhile, and by `PATIENCE_S` afterwards."""
        self.happened = False
        try:
            time.sleep(seconds)
        except KeyboardInterrupt:
            return True
        self._watch()
        return False

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        if self.happened and self.raising and time.monotonic() - self._last_s < _ONE_S:
            return
        if self.happened or not self.raising:
            self.end()
        self._watch()
        raise KeyboardInterrupt

    def _watch(self) -> None:
        self.happened, self._last_s = True, time.monotonic()
        threading.Thread(target=self._end_when_late, name="interrupt", daemon=True).start()

    def _end_when_late(self) -> None:
        begun_s = self._last_s
        time.sleep(PATIENCE_S)
        if self.happened and self._last_s == begun_s:
            self.end()

    def _on_unraisable(self, unraisable: Any) -> None:
        """An interrupt that a destructor swallowed is raised again where it can be caught."""
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            threading.Thread(target=self._again, name="interrupt", daemon=True).start()
        else:
            sys.__unraisablehook__(unraisable)

    def _again(self) -> None:
        time.sleep(_DESTRUCTOR_S)
        self.happened = False
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)  # wakes it from a call into C, too


interrupts = Interrupts()
