"""Sends one event to a receiver. The address of the connected peer decides whether anything is sent, no redirect is
followed, and of the answer only the status is read."""

import ipaddress
import re
import socket
import ssl
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.metadata import version

from registry.domain.webhooks.deliveries import DeliveryOutcome
from registry.errors import RegistryError
from registry.formats.webhooks import Address, Network, Receiver, is_allowed, parse_receiver

ATTEMPT_S = 10.0
"""The limit of an attempt: connection, TLS, request and status line together."""
MAX_ANSWER_BYTES = 1 << 16
_STATUS_LINE = re.compile(rb"HTTP/1\.[01] ([1-5][0-9]{2})(?: [^\r\n]*)?\r?\n")


def send(url: str, headers: Mapping[str, str], body: bytes, networks: Sequence[Network]) -> DeliveryOutcome:
    """Posts a body. Never raises for what the receiver or the network does: the outcome says it."""
    deadline = time.monotonic() + ATTEMPT_S
    try:
        receiver = parse_receiver(url, networks)
        with _connected(receiver, networks, deadline) as connection:
            connection.settimeout(_left(deadline))
            connection.sendall(_request(receiver, headers, body))
            return DeliveryOutcome(_status(connection, deadline))
    except RegistryError as error:
        return DeliveryOutcome(None, error.detail)
    except TimeoutError:
        return DeliveryOutcome(None, f"It took more than {ATTEMPT_S:g} s.")
    except ssl.SSLError as error:
        why = getattr(error, "verify_message", None) or error.reason or type(error).__name__
        return DeliveryOutcome(None, f"TLS failed: {why}.")
    except socket.gaierror:
        return DeliveryOutcome(None, "Its host name has no address.")
    except OSError as error:
        return DeliveryOutcome(None, f"The connection failed: {error.strerror or type(error).__name__}.")
    except ValueError as error:
        return DeliveryOutcome(None, str(error))


def _connected(receiver: Receiver, networks: Sequence[Network], deadline: float) -> socket.socket:
    """A connection to the first address of the receiver that may be used and answers.

    A name is resolved once, and the addresses that were checked are connected to. So a name that resolves to another
    address a moment later gains nothing; the peer is compared once more.
    """
    resolved = socket.getaddrinfo(receiver.host, receiver.port, type=socket.SOCK_STREAM)
    allowed = [row for row in resolved if is_allowed(_address(row[4]), networks, secure=receiver.secure)]
    if not allowed:
        raise ValueError("No address of its host may be used: see ADAPTORY_WEBHOOK_NETWORKS.")
    failure: OSError = TimeoutError()
    for family, kind, protocol, _, address in allowed[:4]:
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(_left(deadline))
            connection.connect(address)
            if not is_allowed(_address(connection.getpeername()), networks, secure=receiver.secure):
                raise ValueError("It is not connected to the address that was checked.")
            connection.settimeout(_left(deadline))
            if not receiver.secure:
                return connection
            return tls_context().wrap_socket(connection, server_hostname=receiver.host)
        except BaseException as error:
            connection.close()
            if not isinstance(error, OSError) or isinstance(error, ssl.SSLError):
                raise
            failure = error
    raise failure


def _address(address: Sequence[object]) -> Address:
    """The IP address of a socket's address; a link-local one has the name of an interface after a %."""
    return ipaddress.ip_address(str(address[0]).partition("%")[0])


@lru_cache(maxsize=1)
def tls_context() -> ssl.SSLContext:
    """Trusts what this machine trusts, or the certificates of `SSL_CERT_FILE`."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


def _request(receiver: Receiver, headers: Mapping[str, str], body: bytes) -> bytes:
    named = {
        "Host": receiver.authority,
        "User-Agent": f"adaptory/{version('adaptory')}",
        "Content-Length": str(len(body)),
        "Connection": "close",
        **headers,
    }
    lines = [f"POST {receiver.target} HTTP/1.1", *(f"{name}: {value}" for name, value in named.items())]
    return "\r\n".join(lines).encode("ascii") + b"\r\n\r\n" + body


def _status(connection: socket.socket, deadline: float) -> int:
    """The status of the answer, after any interim ones. Raises ValueError for something that is not HTTP."""
    read = b""
    while len(read) < MAX_ANSWER_BYTES:
        match = _STATUS_LINE.match(read)
        if match and match[1] >= b"200":
            return int(match[1])
        if match and (end := re.search(rb"\r?\n\r?\n", read)):
            read = read[end.end() :]
            continue
        if b"\n" in read and match is None:
            break
        connection.settimeout(_left(deadline))
        block = connection.recv(4096)
        if not block:
            break
        read += block
    raise ValueError("It did not answer with HTTP.")


def _left(deadline: float) -> float:
    """The time that is left. Raises TimeoutError when none is."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
