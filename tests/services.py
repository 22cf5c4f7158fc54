"""The real services that tests use where they are found: PostgreSQL, started here for the run."""

import os
import shutil
import socket
import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

REQUIRED = os.environ.get("ADAPTORY_REQUIRE_SERVICES") == "1"
_missing: dict[str, str] = {}


def missing() -> dict[str, str]:
    """What was looked for and not found: name -> how to get it."""
    return dict(_missing)


def add_missing(found: dict[str, str]) -> None:
    _missing.update(found)


def unavailable(name: str, hint: str) -> None:
    """Skips the test that needs the service, or fails it where every service must be there."""
    _missing[name] = hint
    if REQUIRED:
        pytest.fail(f"{name} is required here: {hint}")
    pytest.skip(f"{name} not found: {hint}")


def postgres_binaries() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if found:
        return found[-1].parent
    on_path = shutil.which("initdb")
    return Path(on_path).parent if on_path else None


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def postgres(directory: Path) -> Generator[str]:
    """A cluster of its own below `directory`, on a socket and a free port; yields the URL of its first database."""
    binaries = postgres_binaries()
    if binaries is None:
        unavailable("PostgreSQL", "apt-get install postgresql")
    as_user: list[str] = []
    data = directory / "pg"
    data.mkdir(parents=True)
    if os.geteuid() == 0:  # the server refuses to run as root
        as_user = ["runuser", "-u", "postgres", "--"]
        shutil.chown(data, "postgres")
        for parent in (directory, *directory.parents):
            if parent.owner() == "root" and parent != Path("/"):
                parent.chmod(parent.stat().st_mode | 0o011)
    port = free_port()
    cluster = data / "cluster"
    subprocess.run(
        [*as_user, f"{binaries}/initdb", "-D", cluster, "-U", "adaptory", "--auth=trust", "-N"],
        check=True,
        capture_output=True,
    )
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off -c max_connections=200"
    control = [*as_user, f"{binaries}/pg_ctl", "-D", str(cluster), "-w"]
    subprocess.run([*control, "-o", options, "-l", str(data / "log"), "start"], check=True, capture_output=True)
    try:
        yield f"postgresql://adaptory@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run([*control, "-m", "immediate", "stop"], check=True, capture_output=True)
