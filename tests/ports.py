"""Ports that nothing listens on."""

import socket
from contextlib import ExitStack, suppress


def free_ports(count: int, first: int = 0) -> list[int]:
    """So many different ones; the first is `first` where that is free, as it is after a restart."""
    with ExitStack() as held:
        listeners = [held.enter_context(socket.socket()) for _ in range(count)]
        for listener in listeners:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with suppress(OSError):
            listeners[0].bind(("127.0.0.1", first))
        for listener in listeners:
            if not listener.getsockname()[1]:
                listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in listeners]
