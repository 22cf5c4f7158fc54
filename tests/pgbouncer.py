"""PgBouncer in transaction mode before a cluster."""

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

from tests import services
from tests.eventually import eventually

SERVER_CONNECTIONS = 10


@contextmanager
def before(url: str) -> Generator[str]:
    """The URL of the same database by way of PgBouncer, which opens at most SERVER_CONNECTIONS to it."""
    program = shutil.which("pgbouncer")
    if program is None:
        services.unavailable("PgBouncer", "apt-get install pgbouncer")
    parts, port = urlsplit(url), services.free_port()
    with tempfile.TemporaryDirectory() as made:
        directory = Path(made)
        users, config, log = directory / "users", directory / "pgbouncer.ini", directory / "log"
        users.write_text(f'"{parts.username}" ""\n')
        config.write_text(
            f"""[databases]
* = host={parts.hostname} port={parts.port}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = trust
auth_file = {users}
logfile = {log}
pool_mode = transaction
default_pool_size = {SERVER_CONNECTIONS}
ignore_startup_parameters = extra_float_digits,options
"""
        )
        command = [str(program), str(config)]
        if os.geteuid() == 0:  # which it refuses to run as
            shutil.chown(directory, "postgres")
            command = ["runuser", "-u", "postgres", "--", *command]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            eventually(lambda: _answers(port) or process.poll() is not None)
            assert process.poll() is None, log.read_text() if log.exists() else "it has written no log"
            yield f"postgresql://{parts.username}@127.0.0.1:{port}{parts.path}"
        finally:
            process.terminate()
            process.wait()


def _answers(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False
