"""`adaptory …` in a process of its own on a terminal of 80 columns."""

import fcntl
import os
import pty
import re
import signal
import struct
import termios
from collections.abc import Iterable
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess

from tests.forked import start_on_terminal
from tests.scenarios.world import Cli, own_environment

COLUMNS = 80
_END = "end of command, status"
_ONE_AFTER_ANOTHER = """
import sys
from registry.cli.start import run
for words in {commands}:
    sys.argv = ["adaptory", *words]
    try:
        run()
    except SystemExit as ended:
        print("{end}", ended.code or 0, flush=True)
sys.exit()
"""
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass
class OnTerminal:
    """The command's output on the terminal, as it arrives."""

    process: BaseProcess
    terminal: int
    _shown: bytearray = field(default_factory=bytearray)

    def read(self) -> bool:
        """Waits for more; False at the end."""
        try:
            got = os.read(self.terminal, 1 << 16)
        except OSError:  # EIO: the command has ended
            return False
        self._shown += got
        return bool(got)

    def read_until(self, text: str) -> None:
        while text not in self.text:
            assert self.read(), self.text

    @property
    def text(self) -> str:
        return _CONTROL.sub("", self._shown.decode(errors="replace"))

    @property
    def lines(self) -> list[str]:
        """Every line that was ever shown: a progress bar redraws its own."""
        return [line for line in re.split(r"[\r\n]+", self.text) if line.strip()]

    def end(self) -> int:
        while self.read():
            pass
        os.close(self.terminal)
        self.process.join(30)
        assert self.process.exitcode is not None
        return self.process.exitcode

    def interrupt(self) -> None:
        """Interrupts it like Ctrl-C."""
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGINT)


def on_terminal(cli: Cli, *words: object, code: str = "") -> OnTerminal:
    """Starts the command; `code` runs before it."""
    terminal, inside = pty.openpty()
    fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", 50, COLUMNS, 0, 0))
    values = {**own_environment(cli), "TERM": "xterm"}
    values.pop("COLUMNS", None)
    process = start_on_terminal(words, values, inside, code)
    os.close(inside)
    return OnTerminal(process, terminal)


def one_after_another(cli: Cli, commands: Iterable[tuple[object, ...]]) -> list[tuple[int, list[str]]]:
    """The exit status and the lines of each command, all in one process: separate processes would take seconds to
    start."""
    words = [[*map(str, command)] for command in commands]
    shown = on_terminal(cli, code=_ONE_AFTER_ANOTHER.format(commands=words, end=_END))
    shown.end()
    ended: list[tuple[int, list[str]]] = []
    lines: list[str] = []
    for line in shown.lines:
        if line.startswith(_END):
            ended.append((int(line.removeprefix(_END)), lines))
            lines = []
        else:
            lines.append(line)
    assert len(ended) == len(words), shown.text
    return ended
