"""What the options of serving commands have in common."""

from registry.errors import Usage


def address(text: str) -> tuple[str, int]:
    """The host and port of HOST:PORT; loopback for a port alone. Raises Usage for anything else."""
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        raise Usage("bad_address", f"{text} has no port.", subject=text)
    return host.strip("[]") or "127.0.0.1", int(port)
