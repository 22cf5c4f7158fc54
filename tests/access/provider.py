"""A local OpenID provider: a real HTTP server on loopback that signs one user in, and checks its clients' requests."""

import base64
import hashlib
import json
import time
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

import httpx2

from tests.access.issuer import key_of, signed

CLIENT, SECRET = "adaptory at acme", "s3cret:with/odd=characters"
REDIRECT = "https://registry/login/callback"


@dataclass
class Provider:
    """A provider whose next answers can be changed: claims of the ID token (None leaves one out), its key, answers by
    path."""

    url: str = ""
    claims: dict[str, Any] = field(default_factory=dict)
    key: str = "RS256"
    answers: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    hangs_at: str = ""
    released: Event = field(default_factory=Event)
    methods: list[str] = field(default_factory=lambda: ["client_secret_basic", "client_secret_post"])
    open_codes: dict[str, dict[str, str]] = field(default_factory=dict)
    redeemed: list[dict[str, str]] = field(default_factory=list)

    def reset(self) -> None:
        self.claims, self.key, self.answers, self.hangs_at = {}, "RS256", {}, ""
        self.methods = ["client_secret_basic", "client_secret_post"]
        self.redeemed = []

    def description(self) -> dict[str, Any]:
        return {
            "issuer": self.url,
            "authorization_endpoint": f"{self.url}/authorize?tenant=acme",
            "token_endpoint": f"{self.url}/token",
            "jwks_uri": f"{self.url}/keys",
            "token_endpoint_auth_methods_supported": self.methods,
        }

    def authorize(self, query: dict[str, str]) -> str:
        """The redirect of the authorization endpoint: the user is already signed in there."""
        expected = {"response_type": "code", "client_id": CLIENT, "redirect_uri": REDIRECT, "tenant": "acme"}
        assert expected.items() <= query.items(), query
        assert query["code_challenge_method"] == "S256"
        assert {"openid", "profile"} <= set(query["scope"].split())
        code = uuid.uuid4().hex
        self.open_codes[code] = query
        return f"{REDIRECT}?{urlencode({'code': code, 'state': query['state'], 'iss': self.url, 'session_state': 'x'})}"

    def redeem(self, fields: dict[str, str], authorization: str) -> tuple[int, dict[str, Any]]:
        self.redeemed.append(fields)
        given = (fields.get("client_id", ""), fields.get("client_secret", ""))
        if authorization:
            pair = base64.b64decode(authorization.removeprefix("Basic ")).decode().partition(":")
            given = (unquote(pair[0].replace("+", " ")), unquote(pair[2].replace("+", " ")))
        if given != (CLIENT, SECRET):
            return 401, {"error": "invalid_client"}
        query = self.open_codes.pop(fields["code"], None)
        challenge = _base64(hashlib.sha256(fields["code_verifier"].encode()).digest())
        if query is None or query["code_challenge"] != challenge or query["redirect_uri"] != fields["redirect_uri"]:
            return 400, {"error": "invalid_grant"}
        return 200, {"access_token": "x", "token_type": "Bearer", "id_token": self.id_token(query["nonce"])}

    def id_token(self, nonce: str) -> str:
        now = int(time.time())
        claims = {
            "iss": self.url, "aud": CLIENT, "sub": "4711", "iat": now, "exp": now + 300, "nonce": nonce,
            "preferred_username": "ann", "groups": ["ml-team", "other"], "azp": CLIENT,
        }  # fmt: skip
        kept = {name: value for name, value in (claims | self.claims).items() if value is not None}
        return signed(kept, key=key_of(self.key))


class _Handler(BaseHTTPRequestHandler):
    local: Provider

    def do_GET(self) -> None:
        url, local = urlsplit(self.path), self.local
        if self._scripted(url.path):
            return
        if url.path == "/authorize":
            query = {name: values[0] for name, values in parse_qs(url.query).items()}
            self._send(302, b"", Location=local.authorize(query))
            return
        public = {**key_of("RS256").as_dict(private=False), "kid": key_of("RS256").kid, "use": "sig"}
        pages = {"/.well-known/openid-configuration": local.description(), "/keys": {"keys": [public]}}
        self._send(200 if url.path in pages else 404, json.dumps(pages.get(url.path, {})).encode())

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if not self._scripted(self.path):
            fields = {name: values[0] for name, values in parse_qs(body).items()}
            status, document = self.local.redeem(fields, self.headers.get("Authorization", ""))
            self._send(status, json.dumps(document).encode())

    def _scripted(self, path: str) -> bool:
        if path == self.local.hangs_at:
            self.local.released.wait(20)  # the client no longer waits for the answer
        elif path in self.local.answers:
            self._send(*self.local.answers[path])
        return path in self.local.answers or path == self.local.hangs_at

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Logs nothing."""


@contextmanager
def provider() -> Generator[Provider]:
    local = Provider()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"local": local}))
    local.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield local
    finally:
        local.released.set()
        server.shutdown()
        server.server_close()
        thread.join(10)


def visit(address: str) -> str:
    """Visits the provider as a signed-in browser; returns the address of the redirect."""
    answer = httpx2.get(address, follow_redirects=False)
    assert answer.status_code == 302, answer.text
    return answer.headers["location"]


def _base64(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()
