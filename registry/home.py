"""The home directory, closed to the other users of its machine, and the secrets of the servers that run from it.

A server for one user listens on loopback, which every user of the machine reaches. It asks for a secret that only its
own user can read: `server-PORT.secret` in the home, new at each start and removed when the server ends.
"""

import logging
import os
import secrets
from contextlib import suppress
from pathlib import Path
from tempfile import mkstemp
from urllib.parse import urlsplit

from registry.addresses import is_loopback

log = logging.getLogger(__name__)

_OTHERS = 0o077
_MAX_BYTES = 1000


def close_directory(path: Path) -> None:
    """Makes the directory, with mode 0700 whatever the umask. One of this user that others may look into is closed to
    them, with a warning if there is something in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)
    state = path.stat()
    if state.st_uid == os.geteuid() and state.st_mode & _OTHERS:
        path.chmod(0o700)
        if any(path.iterdir()):
            log.warning("Other users of this machine could look into %s; now its mode is 0700.", path)


def close_file(path: Path) -> None:
    """Makes the file, empty and with mode 0600 whatever the umask, or closes one of this user to others."""
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    state = path.stat()
    if state.st_uid == os.geteuid() and state.st_mode & _OTHERS:
        path.chmod(0o600)


def secret_path(home: Path, port: int) -> Path:
    """Where the secret of the server at that port is."""
    return home / f"server-{port}.secret"


def link_path(home: Path, port: int) -> Path:
    """Where the code of its sign-in link is, until the link is used."""
    return home / f"server-{port}.link"


def begin_serving(home: Path, port: int, secret: str | None) -> tuple[str, str]:
    """Writes the files of a server that starts. Returns its secret, a new one unless given, and the code of its
    link."""
    close_directory(home)
    secret, code = secret or secrets.token_urlsafe(32), secrets.token_urlsafe(24)
    _write(secret_path(home, port), secret)
    _write(link_path(home, port), code)
    return secret, code


def end_serving(home: Path, port: int) -> None:
    """Removes the files of a server that has ended."""
    secret_path(home, port).unlink(missing_ok=True)
    link_path(home, port).unlink(missing_ok=True)


def use_link(home: Path, port: int, code: str) -> bool:
    """Whether the code is that of the server's link, which has not been used. It is used from then on."""
    path = link_path(home, port)
    try:
        if not secrets.compare_digest(path.read_bytes(), code.encode()):
            return False
        path.unlink()  # one of two that use it at once fails here
    except FileNotFoundError:
        return False
    return True


def secret_for(home: Path, url: str) -> str | None:
    """The secret of the server at that address, if it runs on this machine and from this home."""
    parts = urlsplit(url)
    if parts.scheme != "http" or not is_loopback(parts.hostname or ""):
        return None
    path = secret_path(home, parts.port or 80)
    try:
        state = path.stat()
        own = state.st_uid == os.geteuid() and not state.st_mode & _OTHERS and state.st_size <= _MAX_BYTES
        return path.read_text().strip() or None if own else None
    except OSError:  # another home, or a server with tokens
        return None


def _write(path: Path, text: str) -> None:
    """Replaces the file; it is never readable by others."""
    descriptor, name = mkstemp(dir=path.parent, prefix=".server.")  # mode 0600, always a new file
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    Path(name).replace(path)
