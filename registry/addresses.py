"""Addresses of registries and hosts."""

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


def registry_url(text: str) -> str:
    """Returns the address of a registry without a trailing slash and without `/v1`, which requests add themselves.

    Raises ValueError for any other path, a query, or a name and password.
    """
    host = r"(?:[^/\s?#@:\\\[\]]+|\[[0-9a-fA-F:.]+\])(?::[0-9]{1,5})?"
    match = re.fullmatch(rf"(https?://{host})(?:/(?:v1/?)?)?", text.strip())
    if match is None:
        raise ValueError("it is not the address of a registry, such as https://adapters.example, without a path")
    return match.group(1)
