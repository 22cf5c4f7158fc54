"""Ports that nothing listens on."""

import os
import random
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from functools import cache
from itertools import chain, cycle

_PROCESSES = 8
_OWN = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _PROCESSES
_RANGE = range(20_000 + _OWN, 30_000, _PROCESSES)
"""Below the ports of outgoing connections, and different for each test process: either could occupy the port of a
server that is about to restart."""
BEHIND_S3 = range(30_000 + _OWN, 32_000, _PROCESSES)
"""For connections within an S3 server: a late restart would otherwise reach a stranger that has taken the port."""


def free_ports(count: int, first: int = 0, among: range = _RANGE) -> list[int]:
    """Several different free ports; the first is `first` if it is free, as after a restart."""
    with ExitStack() as held:
        candidates = chain([first] if first else [], _shuffled(among))
        ports: list[int] = []
        while len(ports) < count:
            listener = held.enter_context(socket.socket())
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            port = next(candidates)
            with suppress(OSError):
                listener.bind(("127.0.0.1", port))
                ports.append(port)
        return ports


@cache
def _shuffled(among: range) -> Iterator[int]:
    """Each port once before any comes again: the server of the call before may not listen on its port yet."""
    return cycle(random.sample(among, len(among)))
