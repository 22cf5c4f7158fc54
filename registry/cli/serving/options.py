"""What the options of serving commands have in common."""

import re

from registry.errors import Usage

_DURATION = re.compile(r"(\d{1,6})(s|m|h|d)")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds(text: str) -> float:
    """A time such as 30s, 10m, 2h or 1d, in seconds. Raises Usage for anything else."""
    match = _DURATION.fullmatch(text)
    if match is None:
        raise Usage("bad_duration", f"{text!r} does not say how long.", subject=text)
    return float(match[1]) * _SECONDS[match[2]]


def address(text: str) -> tuple[str, int]:
    """The host and port of HOST:PORT; loopback for a port alone. Raises Usage for anything else."""
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        raise Usage("bad_address", f"{text} has no port.", subject=text)
    return host.strip("[]") or "127.0.0.1", int(port)
