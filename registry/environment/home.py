"""The home directory, closed to the other users of its machine, and the secrets of the servers that run from it.

A server for one user listens on loopback, which every user of the machine reaches. It asks for a secret that only its
own user can read: `server-PORT.secret` in the home, new at each start and removed when the server ends.

Other users may listen on the port at other loopback addresses, and at this one after the server was killed. So the
secret is sent only to the address of its server, `server-ADDRESS-PORT.secret` for any but 127.0.0.1, and only while the
server holds a lock on the file.
"""

import fcntl
import logging
import os
import secrets
import stat
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import mkstemp
from urllib.parse import urlsplit

from registry.environment.network import is_loopback
from registry.errors import Unavailable

log = logging.getLogger(__name__)

_OTHERS = 0o077
_MAX_BYTES = 1000


def close_directory(path: Path) -> None:
    """Makes the directory, with mode 0700 whatever the umask. A directory of this user that others may read is closed
    to them, with a warning if it is not empty. Raises Unavailable for one that all users share, such as /tmp."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)
    state = path.stat()
    shared = state.st_mode & stat.S_ISVTX and state.st_mode & stat.S_IWOTH
    if shared or path.resolve() == Path(path.anchor or "/"):
        raise _unusable(path, "all users of this machine use it")
    if state.st_uid == os.geteuid() and state.st_mode & _OTHERS:
        path.chmod(0o700)
        if any(path.iterdir()):
            log.warning("Other users of this machine could read %s; its mode is now 0700.", path)


def close_file(path: Path) -> None:
    """Makes the file, empty and with mode 0600 whatever the umask, or closes one of this user to others."""
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    state = path.stat()
    if state.st_uid == os.geteuid() and state.st_mode & _OTHERS:
        path.chmod(0o600)


def secret_path(home: Path, host: str, port: int) -> Path:
    """The file with the secret of the server at that address."""
    return home / f"server-{_address(host)}{port}.secret"


def link_path(home: Path, host: str, port: int) -> Path:
    """The file with the code of its sign-in link, until the link is used."""
    return secret_path(home, host, port).with_suffix(".link")


@contextmanager
def serving(home: Path, host: str, port: int, given: str | None = None) -> Generator[tuple[str, str]]:
    """Keeps the files of a server while it runs. Yields its secret, a new one unless given, and the code of its link.
    Raises Unavailable for a home that belongs to another user, who could replace the files."""
    close_directory(home)
    if home.stat().st_uid not in (os.geteuid(), 0):
        raise _unusable(home, "it belongs to another user")
    for path in (*home.glob("server-*.secret"), *home.glob("server-*.link")):  # of servers that were killed
        with suppress(FileNotFoundError):
            if not _is_locked(path):
                path.unlink()
    secret, code = given or secrets.token_urlsafe(32), secrets.token_urlsafe(24)
    paths = secret_path(home, host, port), link_path(home, host, port)
    locks = [_write(path, text) for path, text in zip(paths, (secret, code), strict=True)]
    try:
        yield secret, code
    finally:
        for path, lock in zip(paths, locks, strict=True):
            path.unlink(missing_ok=True)
            os.close(lock)


def use_link(home: Path, host: str, port: int, code: str) -> bool:
    """Whether the code is that of the server's link, which has not been used. The link is used up from then on."""
    path = link_path(home, host, port)
    try:
        if not secrets.compare_digest(path.read_bytes(), code.encode()):
            return False
        path.unlink()  # one of two that use it at once fails here
    except FileNotFoundError:
        return False
    return True


def with_secret(home: Path, url: str) -> tuple[str, str | None]:
    """The address to send to, and the secret of the server there, if one runs on this machine and from this home.
    `localhost` may stand for several addresses; it is replaced by the server's."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if parts.scheme != "http" or not is_loopback(host):
        return url, None
    secret = _secret_in(secret_path(home, host, parts.port or 80))
    if secret is not None and host == "localhost":
        return parts._replace(netloc=f"127.0.0.1:{parts.port or 80}").geturl(), secret
    return url, secret


def _secret_in(path: Path) -> str | None:
    try:
        state = path.stat()
        own = state.st_uid == os.geteuid() and not state.st_mode & _OTHERS and state.st_size <= _MAX_BYTES
        return path.read_text().strip() or None if own and _is_locked(path) else None
    except OSError:  # another home, or a server with tokens
        return None


def _address(host: str) -> str:
    """The part of its files' names for the address, with a dash; empty for 127.0.0.1, where `--host localhost` listens
    too."""
    return "" if host in ("127.0.0.1", "localhost") else f"{host}-"


def _is_locked(path: Path) -> bool:
    """Whether the server of the file is running: the lock ends with its process, however that ends."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def _write(path: Path, text: str) -> int:
    """Replaces the file; it is never readable by others. Returns a descriptor that holds its lock."""
    descriptor, name = mkstemp(dir=path.parent, prefix=".server.")  # mode 0600, always a new file
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    os.write(descriptor, text.encode())
    Path(name).replace(path)
    return descriptor


def _unusable(path: Path, why: str) -> Unavailable:
    return Unavailable(
        "home_unusable",
        f"{path} cannot be used: {why}.",
        subject=str(path),
        next_step="Set ADAPTORY_HOME to a directory of your own.",
    )
