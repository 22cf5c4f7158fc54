"""Processes that start within milliseconds: forked from one that has imported everything."""

import faulthandler
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

_FORKED = multiprocessing.get_context("forkserver")
_FORKED.set_forkserver_preload(["tests.preloaded"])
_SERVER = forkserver._forkserver  # the one of the context
_ADDRESS = "ADAPTORY_TEST_FORKSERVER"
_OF_TESTS = "ADAPTORY_TEST_"
_REMEMBERED: dict[str, str] = {}
"""The tests' own variables, where a test has removed them from the environment, with the address."""


def share() -> None:
    """Starts the process that others are forked from, for all test processes started by this one: its imports take five
    seconds of CPU and 500 MB."""
    forkserver.ensure_running()
    os.environ[_ADDRESS] = str(_SERVER._forkserver_address)


def remember() -> None:
    """Keeps the tests' own variables, which commands run without."""
    _REMEMBERED.update({name: text for name, text in os.environ.items() if name.startswith(_OF_TESTS)})


@lru_cache
def _join_shared() -> None:
    """Forks from the process that the environment names. It ends with the test process that started it."""
    address = _REMEMBERED.get(_ADDRESS, os.environ.get(_ADDRESS))
    if address and _SERVER._forkserver_pid is None:
        _SERVER._forkserver_address = address
        _SERVER._forkserver_alive_fd = os.pipe()[1]  # the forked ones get one of each test process
        _SERVER.ensure_running = resource_tracker.ensure_running


def start(work: Callable[..., None], environment: Mapping[str, str], *arguments: object) -> BaseProcess:
    """A process that runs the work. Its stderr belongs to the test, and is shown if the work fails."""
    _join_shared()
    _SERVER.ensure_running()
    address = str(_SERVER._forkserver_address)
    with Connection(os.dup(2)) as errors:
        process = _FORKED.Process(
            target=_run,
            args=(work, dict(environment), errors, address, arguments),
            daemon=True,
        )
        process.start()
    return process


def start_command(
    words: Sequence[object], environment: Mapping[str, str], log: Path, errors: Path | None = None
) -> BaseProcess:
    """`adaptory …` as a shell would run it with exactly this environment. Its output goes to `log`, including stderr
    unless `errors` names a file."""
    log.touch()
    return start(_command, environment, [*map(str, words)], dict(environment), str(log), str(errors or log))


def start_on_terminal(words: Sequence[object], environment: Mapping[str, str], terminal: int, code: str) -> BaseProcess:
    """The same with a terminal for input and output; `code` runs before it."""
    with Connection(os.dup(terminal)) as passed:
        return start(_command_on_terminal, environment, [*map(str, words)], dict(environment), passed, code)


def launch_template(end: int, passed: Mapping[str, str], code: str = "") -> Callable[[], object]:
    """`registry.worker.engine.template.launch`, without three seconds of imports; `code` runs before it."""
    _join_shared()
    if _SERVER._forkserver_address is None:
        kept = {name: text for name, text in _REMEMBERED.items() if name not in os.environ}
        os.environ.update(kept)
        _SERVER.ensure_running()
        for name in kept:
            del os.environ[name]
    own = multiprocessing.current_process()._config
    daemon = own.pop("daemon", None)  # such a process may not start others
    try:
        with Connection(os.dup(end)) as theirs, Connection(os.dup(2)) as errors:
            process = _FORKED.Process(target=_template, args=(dict(passed), list(sys.path), theirs, errors, code))
            process.start()
    finally:
        if daemon is not None:
            own["daemon"] = daemon
    multiprocessing.process._children.discard(process)  # it ends with the socket, and is not waited for
    return process.join


def _template(passed: dict[str, str], paths: list[str], end: Connection, errors: Connection, code: str) -> None:
    from registry.worker.engine import child

    os.setsid()
    for stream in (1, 2):
        os.dup2(errors.fileno(), stream)
    errors.close()
    os.environ.update(passed)
    _take_environment(passed)
    sys.path[:] = paths
    exec(code, {})  # noqa: S102 - the test's own
    child.main(os.dup(end.fileno()))


_READ_AT_IMPORT = ("accelerate", "huggingface_hub", "transformers")
"""Packages that read the hub's settings when they are imported."""


def _run(
    work: Callable[..., None],
    environment: dict[str, str],
    errors: Connection,
    address: str,
    arguments: tuple[object, ...],
) -> None:
    _REMEMBERED[_ADDRESS] = address
    os.dup2(errors.fileno(), 2)
    with _hub_settings_read_anew():
        os.environ.update(environment)
    work(*arguments)


@contextmanager
def _hub_settings_read_anew() -> Generator[None]:
    """Forgets modules imported with other settings of the hub."""
    before = _hub_settings()
    yield
    if _hub_settings() != before:
        for name in [name for name in sys.modules if name.partition(".")[0] in _READ_AT_IMPORT]:
            del sys.modules[name]


def _hub_settings() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("HF_")}


def _command(words: list[str], environment: dict[str, str], log: str, errors: str) -> None:
    from registry.cli.start import run

    _take_environment(environment)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle if errors == log else os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    faulthandler.enable()  # SIGABRT makes a process print its stack
    sys.argv = ["adaptory", *words]
    run()


def _command_on_terminal(words: list[str], environment: dict[str, str], terminal: Connection, code: str) -> None:
    from registry.cli.start import main

    _take_environment(environment)
    for stream in range(3):
        os.dup2(terminal.fileno(), stream)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", 1), open(2, "w", 1)  # noqa: SIM115 - as Python starts
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background processes ignore it
    sys.argv = ["adaptory", *words]
    exec(code, {})  # noqa: S102 - the test's own
    main()


def _take_environment(environment: Mapping[str, str]) -> None:
    """Removes this process's environment from the forked one's."""
    with _hub_settings_read_anew():
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
