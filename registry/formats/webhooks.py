"""The requests to webhooks: events, bodies in CloudEvents 1.0 or for Slack, and signatures of Standard Webhooks 1.0."""

import base64
import hashlib
import hmac
import ipaddress
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

from registry.errors import Usage

EventName = Literal[
    "release.published",
    "release.yanked",
    "release.unyanked",
    "release.taken_down",
    "channel.moved",
    "promotion.waiting",
    "promotion.approved",
    "promotion.refused",
    "change.waiting",
    "change.ended",
    "job.ended",
    "fleet.drifted",
    "fleet.recovered",
]
EVENTS: tuple[EventName, ...] = get_args(EventName)
TEST = "webhook.test"
"""Sent on request, to any webhook."""
Format = Literal["cloudevents", "slack"]

PAUSES: tuple[timedelta, ...] = (
    timedelta(seconds=5),
    timedelta(seconds=30),
    timedelta(minutes=5),
    timedelta(minutes=30),
    timedelta(hours=2),
    timedelta(hours=8),
    timedelta(hours=24),
)
"""The pause after each failed attempt. A delivery that then fails again is dead."""
MAX_URL = 500
_SECRET_BYTES = 32
_PREFIX = "whsec_"

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_NOT_PUBLIC = [
    ipaddress.ip_network(network)
    for network in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24"),
        *("203.0.113.0/24", "224.0.0.0/3", "168.63.129.16/32", "2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"),
    )
]
"""IANA's special-purpose networks, with 6to4 and Teredo, and the address at which Azure answers its virtual machines.
`is_global` of Python's library depends on its version: that of 3.11.7 counts 192.0.0.192 as public."""
_PUBLIC_IPV6 = ipaddress.IPv6Network("2000::/3")


@dataclass(frozen=True, slots=True)
class Receiver:
    """The address of a receiver. `target` is the path and the query, as a request names them."""

    secure: bool
    host: str
    port: int
    target: str

    @property
    def authority(self) -> str:
        """The value of the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.secure else 80) else f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Event:
    """An audit row as an event. `id` is that of the row, the same in each attempt."""

    id: int
    type: str
    subject: str
    at: datetime
    namespace: str | None
    act: str
    actor: str
    reason: str | None
    before: Mapping[str, Any] | None
    after: Mapping[str, Any] | None
    detail: Mapping[str, Any]


def parse_receiver(url: str, networks: Sequence[Network] = ()) -> Receiver:
    """Raises Usage for an address that nothing may be sent to. `networks` are those that the operator allows: with any,
    http is accepted too, since only the connection shows which network a name is in."""
    if len(url) > MAX_URL or not re.fullmatch(r"https?://[\x21-\x7e]+", url):
        raise _bad("it must be an https address of printable ASCII characters, of at most 500")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise _bad("its port or its host is malformed") from None
    if parts.username is not None or parts.password is not None or "@" in parts.netloc:
        raise _bad("it has a user name or a password")
    if parts.fragment or "\\" in url or not parts.hostname or port == 0:
        raise _bad("it has a fragment, a backslash, or no host")
    if parts.scheme == "http" and not networks:
        raise _bad("it must begin with https")
    try:
        named = ipaddress.ip_address(parts.hostname)
    except ValueError:
        named = None
    if parts.hostname == "localhost":
        named = ipaddress.ip_address("127.0.0.1")
    secure = parts.scheme == "https"
    if named is not None and not is_allowed(named, networks, secure=secure):
        raise _bad(f"{named} is not a public address")
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Receiver(secure, parts.hostname, port or (443 if secure else 80), target)


def is_allowed(address: Address, networks: Sequence[Network], *, secure: bool) -> bool:
    """Whether an event may be sent to a peer: to a public one with TLS, and to one in these networks."""
    real = _embedded(address)
    if any(real in network for network in networks):  # one of the other version is in no network
        return True
    public = real.version == 4 or real in _PUBLIC_IPV6
    return secure and public and not any(real in network for network in _NOT_PUBLIC)


def _embedded(address: Address) -> Address:
    """The IPv4 address that an IPv6 address stands for (mapped, NAT64), which the packets reach in the end."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address in _NAT64:
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address


def shown_url(url: str, format_: str) -> str:
    """The address without what may be a secret: the query, and Slack's path."""
    parts = urlsplit(url)
    origin = f"{parts.scheme}://{parts.netloc}"
    return f"{origin}/…" if format_ == "slack" else origin + parts.path + ("?…" if parts.query else "")


def message_id(event_id: int) -> str:
    """The header `webhook-id`: the same in each attempt and replay, so that receivers can drop repetitions."""
    return f"evt_{event_id}"


def new_secret() -> str:
    """A secret in the form of Standard Webhooks."""
    return _PREFIX + base64.b64encode(secrets.token_bytes(_SECRET_BYTES)).decode()


def signature_headers(secrets_: Sequence[str], id_: str, at: datetime, body: bytes) -> dict[str, str]:
    """The three headers of Standard Webhooks; a signature for each secret, newest first."""
    timestamp = str(int(at.timestamp()))
    signed = f"{id_}.{timestamp}.".encode() + body
    keys = [base64.b64decode(secret.removeprefix(_PREFIX)) for secret in secrets_]
    signatures = [base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode() for key in keys]
    return {
        "webhook-id": id_,
        "webhook-timestamp": timestamp,
        "webhook-signature": " ".join(f"v1,{signature}" for signature in signatures),
    }


def render(event: Event, format_: str, source: str) -> tuple[str, bytes]:
    """The content type and the body of an event."""
    if format_ == "slack":
        return "application/json", _json({"text": _sentence(event)})
    body = {
        "specversion": "1.0",
        "id": str(event.id),
        "source": source,
        "type": f"adaptory.{event.type}",
        "subject": event.subject,
        "time": event.at.astimezone(UTC).isoformat().replace("+00:00", "Z"),
        "datacontenttype": "application/json",
        "data": {
            "namespace": event.namespace,
            "subject": event.subject,
            "act": event.act,
            "actor": event.actor,
            "reason": event.reason,
            "before": event.before,
            "after": event.after,
            "detail": event.detail,
        },
    }
    return "application/cloudevents+json; charset=utf-8", _json(body)


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _sentence(event: Event) -> str:
    """One line about an event, with the characters escaped that Slack gives a meaning."""
    version, state, summary = ((event.after or {}).get(name) for name in ("version", "state", "summary"))
    was = (event.before or {}).get("version")
    texts = {
        "release.published": "was published",
        "release.yanked": "was yanked",
        "release.unyanked": "is no longer yanked",
        "release.taken_down": "was taken down",
        "channel.moved": f"now serves {version or 'nothing'}" + (f" instead of {was}" if was else ""),
        "promotion.waiting": f"has a promotion of {version} that waits",
        "promotion.approved": f"has an approval of {version}",
        "promotion.refused": f"does not get {event.detail.get('version')}: {state}",
        "change.waiting": f"waits for a second admin: {summary}",
        "change.ended": f"is {state}: {summary}",
        "job.ended": f"({event.detail.get('kind')}) ended: {state}",
        "fleet.drifted": f"has nodes out of step: {event.detail.get('count')}",
        "fleet.recovered": f"has nodes in step again: {event.detail.get('count')}",
    }
    line = f"{event.subject} {texts.get(event.type, 'is tested')}, by {event.actor}"
    line += f": {event.reason}" if event.reason else ""
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _bad(why: str) -> Usage:
    return Usage("bad_webhook", f"The webhook cannot be added: {why}.")
