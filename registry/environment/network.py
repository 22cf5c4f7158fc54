"""Hosts, networks and addresses of registries, as settings and profiles name them."""

import ipaddress
import re


def is_loopback(host: str) -> bool:
    """Whether the host is `localhost` or a loopback address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def parse_networks(text: str) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
    """Addresses and networks, separated by commas; empty means none. Raises ValueError."""
    return tuple(ipaddress.ip_network(part.strip()) for part in text.split(",")) if text else ()


def registry_url(text: str) -> str:
    """Returns the address of a registry without a trailing slash and without `/v1`, which requests add themselves.

    Raises ValueError for any other path, a query, or a name and password.
    """
    host = r"(?:[^/\s?#@:\\\[\]]+|\[[0-9a-fA-F:.]+\])(?::[0-9]{1,5})?"
    match = re.fullmatch(rf"(https?://{host})(?:/(?:v1/?)?)?", text.strip())
    if match is None:
        raise ValueError("it is not the address of a registry, such as https://adapters.example, without a path")
    return match.group(1)
