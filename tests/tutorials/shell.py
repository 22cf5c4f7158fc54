"""A real shell in which `adaptory` and `python` start immediately: each is forked from a process that imported
everything. A shell script of a dozen commands would otherwise spend a minute on imports."""

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests import forked

_CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
name = os.path.basename(sys.argv[0])
with socket.socket(socket.AF_UNIX) as to:
    to.connect({address!r})
    words = json.dumps([name, sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(to, [len(words).to_bytes(4, "big") + words], [0, 1, 2])
    pid = int.from_bytes(to.recv(4), "big")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: os.kill(pid, number))
    code = to.recv(1)
    sys.exit(code[0] if code else 70)
"""


@contextmanager
def programs(directory: Path) -> Generator[Path]:
    """A folder for PATH with `adaptory` and `python`, and the process behind them."""
    address = str(directory / "programs.sock")
    for name in ("adaptory", "python"):
        script = directory / "bin" / name
        script.parent.mkdir(exist_ok=True)
        script.write_text(_CLIENT.format(python=sys.executable, address=address))
        script.chmod(0o755)
    process = forked.start(_serve, {}, address)
    deadline = time.monotonic() + 180
    while not Path(address).exists() and time.monotonic() < deadline and process.is_alive():
        time.sleep(0.02)
    assert Path(address).exists(), "the process behind the commands did not start"
    try:
        yield directory / "bin"
    finally:
        process.terminate()
        process.join(10)


def _serve(address: str) -> None:
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import composer.conflicts.report
    import composer.evaluation.evaluate
    import composer.merge.run  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, _end_all)
    gc.freeze()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address + ".new")
        listening.listen()
        Path(address + ".new").rename(address)
        while True:
            connection, _ = listening.accept()
            if os.fork() == 0:
                listening.close()
                _run(connection)
            connection.close()


def _end_all(_number: int, _frame: object) -> None:
    """Also ends processes that a page has left running in the background."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)
    os._exit(0)


def _run(connection: socket.socket) -> None:
    code = 70
    try:
        for number in (signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        message, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 3)
        while len(message) < 4 + int.from_bytes(message[:4], "big"):
            message += connection.recv(1 << 20)
        name, words, directory, environment = json.loads(message[4:])
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.chdir(directory)
        os.environ.clear()
        os.environ.update(environment)
        connection.sendall(os.getpid().to_bytes(4, "big"))
        code = _called(name, words)
    finally:
        connection.sendall(bytes([code]))
        os._exit(code)


def _called(name: str, words: list[str]) -> int:
    """Runs the program as its entry point does; returns its exit code."""
    import runpy
    import traceback

    from registry.cli.start import run

    try:
        if name == "adaptory":
            sys.argv = [name, *words]
            run()
        else:
            sys.argv = words
            sys.path[0] = str(Path(words[0]).resolve().parent)
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


class Shell:
    """One bash that keeps its directory, variables and background jobs from command to command."""

    def __init__(self, directory: Path, environment: Mapping[str, str]) -> None:
        self._directory = directory
        self._bash = subprocess.Popen(
            ["/usr/bin/env", "bash", "--noprofile", "--norc"],
            cwd=directory, env=dict(environment), text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self._count = 0

    def __call__(self, command: str) -> tuple[int, str]:
        """The exit code, and the output on stdout and stderr together."""
        assert self._bash.stdin is not None
        assert self._bash.stdout is not None
        self._count += 1
        script, printed = (
            self._directory.parent / f"{self._directory.name}-{self._count}.{kind}" for kind in ("sh", "out")
        )
        script.write_text(command + "\n")
        self._bash.stdin.write(f". {script} > {printed} 2>&1 < /dev/null; echo $?\n")
        self._bash.stdin.flush()
        code = self._bash.stdout.readline()
        assert code, f"the shell ended in: {command}"
        return int(code), printed.read_text()

    def close(self) -> None:
        """Ends the shell and its background jobs."""
        assert self._bash.stdin is not None
        self._bash.stdin.write("kill $(jobs -p) 2>/dev/null; wait\n")
        self._bash.stdin.close()
        self._bash.wait(20)
