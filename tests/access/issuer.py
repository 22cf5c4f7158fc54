"""A local issuer of ID tokens: a real HTTP server with discovery and keys, on loopback."""

import json
import time
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from joserfc import jws
from joserfc.jwk import ECKey, RSAKey

AUDIENCE = "https://adapters.example"
GITHUB_JOB = {
    "repository": "acme/training", "repository_id": "4711", "ref": "refs/heads/main", "environment": "release",
    "workflow_ref": "acme/training/.github/workflows/release.yml@refs/heads/main",
    "sub": "repo:acme/training:environment:release", "run_id": "17", "event_name": "push",
}  # fmt: skip
_KEYS: dict[str, Callable[[], RSAKey | ECKey]] = {
    "RS256": lambda: RSAKey.generate_key(2048, {"kid": "rsa"}),
    "ES256": lambda: ECKey.generate_key("P-256", {"kid": "ec"}),
    "other": lambda: RSAKey.generate_key(2048, {"kid": "rsa"}),
}


@cache
def key_of(name: str) -> RSAKey | ECKey:
    """A key of the issuer; `other` has the id of the first, but is not published. Made on first use: each takes half a
    second."""
    return _KEYS[name]()


@dataclass
class Issuer:
    """Its pages can be replaced: a path maps to a status, headers and a body."""

    url: str = ""
    pages: dict[str, tuple[int, dict[str, str], bytes]] = field(default_factory=dict)
    requested: list[str] = field(default_factory=list)
    queries: list[tuple[str, str]] = field(default_factory=list)

    def publish(self, *keys: RSAKey | ECKey) -> None:
        discovery = {"issuer": self.url, "jwks_uri": f"{self.url}/keys"}
        self.serve("/.well-known/openid-configuration", discovery)
        self.serve("/keys", {"keys": [{**key.as_dict(private=False), "kid": key.kid, "use": "sig"} for key in keys]})

    def serve(self, path: str, document: object, status: int = 200, **headers: str) -> None:
        self.pages[path] = (status, headers, json.dumps(document).encode())

    def claims(self, **changed: Any) -> dict[str, Any]:
        """The claims of a job on GitHub; None leaves one out."""
        now = int(time.time())
        claims = {
            "iss": self.url,
            "aud": AUDIENCE,
            "iat": now,
            "nbf": now - 5,
            "exp": now + 300,
            "jti": uuid.uuid4().hex,
        }
        return {name: value for name, value in (claims | GITHUB_JOB | changed).items() if value is not None}

    def token(self, **changed: Any) -> str:
        return signed(self.claims(**changed))


def signed(claims: dict[str, Any], algorithm: str = "RS256", key: Any = None, **header: Any) -> str:
    key = key or key_of("ES256" if algorithm == "ES256" else "RS256")
    header = {"alg": algorithm, "typ": "JWT", "kid": key.kid or "rsa", **header}
    registry = jws.JWSRegistry(algorithms=[algorithm], strict_check_header=False)
    return jws.serialize_compact(header, json.dumps(claims), key, registry=registry)


@contextmanager
def issuer() -> Generator[Issuer]:
    local = Issuer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urlsplit(self.path)
            local.requested.append(url.path)
            local.queries += parse_qsl(url.query)
            status, headers, body = local.pages.get(url.path, (404, {}, b"{}"))
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Logs nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    local.url = f"http://127.0.0.1:{server.server_address[1]}"
    local.publish(key_of("RS256"), key_of("ES256"))
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield local
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
