"""The key of this machine's worker: `worker-key.pem` in its home, made when it is first needed, or the file that
ADAPTORY_WORKER_KEY names."""

import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import mkstemp

from registry.environment.settings import Settings
from registry.errors import Unavailable
from registry.formats.attestations import new_key, public_half

_FILE = "worker-key.pem"


@dataclass(frozen=True, slots=True)
class OwnKey:
    """The worker's name, and its key in PEM. `private` must stay in the worker's own process: units never get it."""

    worker: str
    private: bytes
    public: str


def own_key(settings: Settings) -> OwnKey | None:
    """Reads the key, and makes it in the home if no setting names one. None without the extra `sign`: then nothing is
    attested. Raises Unavailable if the key of the setting cannot be read, and Invalid if it is not an Ed25519 key."""
    if find_spec("cryptography") is None and settings.worker_key is None:
        return None
    path = settings.worker_key or _made(settings.home_directory / _FILE)
    try:
        private = path.read_bytes()
    except OSError as error:
        raise Unavailable(
            "worker_key_missing", f"The worker's key {path} cannot be read: {error.strerror}.", subject=str(path)
        ) from error
    return OwnKey(socket.gethostname()[:64], private, public_half(private))


def _made(path: Path) -> Path:
    """Makes the key unless it is there. Of two processes, one wins, and both use its key."""
    if not path.exists():
        descriptor, name = mkstemp(dir=path.parent, prefix=".worker-key.")  # mode 0600
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(new_key())
                file.flush()
                os.fsync(file.fileno())
            with suppress(FileExistsError):
                os.link(name, path)
        finally:
            Path(name).unlink()
    return path
