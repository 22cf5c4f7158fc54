"""Identifies users by an OpenID provider: the authorization code flow with PKCE (RFC 7636), state and nonce.

The browser keeps one random secret of an attempt in a cookie. State, nonce and PKCE's verifier are derived from it, so
any server process finishes what another began, nothing is stored, and an answer without that cookie is useless.
"""

import base64
import hashlib
import hmac
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, cast
from urllib.parse import urlencode

from registry.domain.access.people import Person
from registry.domain.access.roles import Role, max_role
from registry.environment.settings import SignInSettings
from registry.errors import Unauthenticated
from registry.formats import id_tokens
from registry.formats.id_tokens import shown
from registry.transfer.issuer_keys import (
    FETCH_ERRORS,
    FETCH_S,
    IssuerKeys,
    fetch_table,
    is_trusted_address,
    issuer_client,
    reason,
    unavailable,
)

MAX_USER, MAX_SUBJECT = 128, 255
LOGOUT = "http://schemas.openid.net/event/backchannel-logout"
_MAX_GROUPS = 10_000
_MAX_CODE = 4096


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt to sign in, by the secret in the browser's cookie."""

    secret: str

    @classmethod
    def new(cls) -> "Attempt":
        return cls(secrets.token_urlsafe(32))

    @property
    def state(self) -> str:
        return self._derived("state")

    @property
    def nonce(self) -> str:
        return self._derived("nonce")

    @property
    def verifier(self) -> str:
        return self._derived("verifier")

    @property
    def challenge(self) -> str:
        return _base64(hashlib.sha256(self.verifier.encode()).digest())

    def _derived(self, what: str) -> str:
        return _base64(hmac.new(self.secret.encode(), what.encode(), hashlib.sha256).digest())


@dataclass(frozen=True, slots=True)
class Identity:
    """A person whom the provider vouches for, and the roles by namespace that its groups give."""

    person: Person
    roles: Mapping[str, Role]


@dataclass(frozen=True, slots=True)
class LoggedOut:
    """A person who has signed out at the provider. `replay_key` is the same for every copy of the token, which is valid
    until `expires_at`."""

    issuer: str
    subject: str
    replay_key: str
    expires_at: datetime


@dataclass(slots=True)
class OpenIdProvider:
    """The provider of the settings; one for each process, since it caches the provider's keys and addresses."""

    settings: SignInSettings
    keys: IssuerKeys = field(default_factory=lambda: IssuerKeys(own_host=False))

    def address(self, attempt: Attempt, redirect_uri: str) -> str:
        """The address at which the browser signs in. Raises Unavailable if the provider cannot be reached."""
        query = {
            "response_type": "code",
            "client_id": self.settings.client_id,
            "redirect_uri": redirect_uri,
            "scope": self.settings.scopes,
            "state": attempt.state,
            "nonce": attempt.nonce,
            "code_challenge": attempt.challenge,
            "code_challenge_method": "S256",
        }
        address = self._endpoint("authorization_endpoint")
        return f"{address}{'&' if '?' in address else '?'}{urlencode(query)}"

    def identify(self, attempt: Attempt, answer: Mapping[str, str], redirect_uri: str, now: datetime) -> Identity:
        """The user identified by the provider's answer: the query fields of the address that the browser returned to.
        Raises Unauthenticated for an answer of another attempt or provider, a refusal, a code that the provider does
        not accept, and an ID token that is not valid for this attempt; Unavailable if the provider cannot be
        reached.
        """
        if not hmac.compare_digest(answer.get("state", "").encode(), attempt.state.encode()):
            raise refused("it belongs to another attempt, or the attempt took too long")
        if answer.get("iss", self.settings.issuer) != self.settings.issuer:  # RFC 9207
            raise refused("it comes from another provider")
        if "error" in answer:
            raise refused(f"the provider answers {shown(answer['error'])}")
        code = answer.get("code", "")
        if not 0 < len(code) <= _MAX_CODE:
            raise refused("it has no code")
        claims = self._claims(self._redeemed(attempt, code, redirect_uri), attempt, now)
        return Identity(Person(self.settings.issuer, _subject(claims), self._user(claims)), self._roles(claims))

    def logged_out(self, text: str, now: datetime) -> LoggedOut:
        """The person whom a logout token names. Raises Unauthenticated for a token that is not valid here (OpenID
        Connect Back-Channel Logout 1.0, 2.6), and Unavailable if the provider's keys cannot be fetched."""
        issuer = self.settings.issuer
        token = id_tokens.parse(text)
        if token.issuer != issuer:
            raise refused(f"it comes from {shown(token.issuer)}")
        id_tokens.verify(token, self.keys.find(issuer, token.key_id))
        expires_at = id_tokens.check(token, self.settings.client_id, now)
        events: object = token.claims.get("events")
        if not isinstance(events, dict) or not isinstance(cast("dict[str, object]", events).get(LOGOUT), dict):
            raise refused("it is not a logout token (events)")
        if "nonce" in token.claims:
            raise refused("it has a nonce, as ID tokens have")
        return LoggedOut(issuer, _subject(token.claims), id_tokens.replay_key(token), expires_at)

    def _endpoint(self, name: str) -> str:
        issuer = self.settings.issuer
        address = self.keys.describe(issuer).get(name)
        if not is_trusted_address(address, issuer):
            raise unavailable(issuer, f"{issuer} names no https address as its {name}")
        return cast(str, address)

    def _redeemed(self, attempt: Attempt, code: str, redirect_uri: str) -> str:
        """Exchanges the code for an ID token."""
        issuer, address = self.settings.issuer, self._endpoint("token_endpoint")
        fields = {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": redirect_uri,
            "code_verifier": attempt.verifier,
        }
        more, headers = self._client_credentials()
        try:
            with issuer_client() as http:
                deadline = time.monotonic() + FETCH_S
                status, table = fetch_table(http, "POST", address, deadline, data=fields | more, headers=headers)
            if status in (400, 401):
                raise refused(f"the provider does not accept its code: {shown(table.get('error', status))}")
            text = table.get("id_token")
            if status != 200 or not isinstance(text, str):
                raise ValueError(f"it answers {status}" if status != 200 else "its answer has no ID token")
        except FETCH_ERRORS as error:
            raise unavailable(issuer, f"{issuer} returned no ID token: {reason(error)}") from error
        return text

    def _client_credentials(self) -> tuple[dict[str, str], dict[str, str]]:
        """The fields and headers that authenticate this client to the provider."""
        settings = self.settings
        if settings.client_secret is None:
            return {"client_id": settings.client_id}, {}
        secret = settings.client_secret.get_secret_value()
        methods = self.keys.describe(settings.issuer).get("token_endpoint_auth_methods_supported")
        if isinstance(methods, list) and "client_secret_basic" not in methods:
            return {"client_id": settings.client_id, "client_secret": secret}, {}
        pair = ":".join(urlencode({"": part})[1:] for part in (settings.client_id, secret))  # RFC 6749, 2.3.1
        return {}, {"Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"}

    def _claims(self, text: str, attempt: Attempt, now: datetime) -> id_tokens.Claims:
        """The claims of a valid ID token."""
        client, issuer = self.settings.client_id, self.settings.issuer
        try:
            token = id_tokens.parse(text)
            if token.issuer != issuer:
                raise refused(f"its ID token comes from {shown(token.issuer)}")
            id_tokens.verify(token, self.keys.find(issuer, token.key_id))
            id_tokens.check(token, client, now)
        except Unauthenticated as error:
            raise error if error.code == "sign_in_refused" else refused(error.detail) from error
        if not hmac.compare_digest(str(token.claims.get("nonce")).encode(), attempt.nonce.encode()):
            raise refused("its ID token belongs to another attempt (nonce)")
        if token.claims.get("azp", client) != client:
            raise refused(f"its ID token was made for {shown(token.claims['azp'])} (azp)")
        return token.claims

    def _user(self, claims: id_tokens.Claims) -> str:
        name = self.settings.user_claim
        user = claims.get(name)
        if name == "email" and claims.get("email_verified") is not True:
            raise refused("the provider has not verified the address (email_verified)")
        readable = isinstance(user, str) and 0 < len(user) <= MAX_USER and user.isprintable() and user == user.strip()
        if not readable or any(character in "/*" for character in cast(str, user)):
            raise refused(f"the claim {name} of its ID token is not a valid user name here")
        return cast(str, user)

    def _roles(self, claims: id_tokens.Claims) -> dict[str, Role]:
        given: Any = claims.get(self.settings.groups_claim)
        rows = cast("list[object]", given)[:_MAX_GROUPS] if isinstance(given, list) else []
        groups = {given} if isinstance(given, str) else {text for text in rows if isinstance(text, str)}
        roles: dict[str, Role] = {}
        for group, namespace, role in self.settings.group_roles:
            if group in groups:
                roles[namespace] = max_role(roles.get(namespace, role), role)
        return roles


def refused(why: str) -> Unauthenticated:
    """The error for an answer that signs nobody in."""
    return Unauthenticated(
        "sign_in_refused",
        f"The provider's answer signs nobody in: {why.removesuffix('.')}.",
        next_step="Sign in again; if it persists, ask an operator.",
    )


def _subject(claims: id_tokens.Claims) -> str:
    """The person's identifier at the provider."""
    subject = claims.get("sub")
    if not isinstance(subject, str) or not 0 < len(subject) <= MAX_SUBJECT or not subject.isprintable():
        raise refused("its ID token does not identify the user (sub)")
    return subject


def _base64(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()
