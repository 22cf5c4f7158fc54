"""Identifies callers: the single user of an embedded registry, the user of a token, or anonymous."""

import asyncio
import hashlib
import logging
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from datetime import datetime
from threading import Lock

from starlette.concurrency import run_in_threadpool

from registry.domain.access import namespaces, sessions, tokens
from registry.domain.access.audit import Actor
from registry.domain.access.roles import ANONYMOUS, UNRESTRICTED
from registry.domain.access.tokens import Caller
from registry.errors import Unauthenticated, Unavailable
from registry.transfer.resources import Resources

log = logging.getLogger(__name__)

MAX_REMEMBERED = 10_000
_MAX_TOKEN_CHARACTERS = 200
_MAX_SOURCE_CHARACTERS = 200


@dataclass(frozen=True, slots=True)
class Credentials:
    """A request's Authorization header, or the secret of its browser session, with its address and client."""

    authorization: str
    source: str
    session: str = ""
    """The cookie of a page's request. Only pages look at it, and they ignore the header."""

    @property
    def key(self) -> str:
        """The key for caches and rate limits: a digest of the secret, or the address of a caller without one."""
        if self.session:  # never that of a header, whatever its text
            return f"session {hashlib.sha256(self.session.encode()).hexdigest()}"
        if self.authorization:
            scheme, _, text = self.authorization.partition(" ")  # one token, however the header is written
            return hashlib.sha256(f"{scheme.lower()} {text.strip()}".encode()).hexdigest()
        return self.address

    @property
    def address(self) -> str:
        return self.source.partition(" ")[0]


@dataclass(slots=True)
class ActorCache:
    """Caches for `access_cache_s` seconds the actor of each token and the public namespaces.

    Changes made by this process apply immediately (`forget`), those of other processes when the time is up. A request
    that changes something always looks up its token: one revoked elsewhere changes nothing.
    """

    resources: Resources
    single_user: bool
    _known: "OrderedDict[str, tuple[float, Caller]]" = field(default_factory=OrderedDict[str, tuple[float, Caller]])
    _public: tuple[float, frozenset[str]] = (0.0, frozenset())
    _asking: "dict[str, asyncio.Future[Actor]]" = field(default_factory=dict[str, "asyncio.Future[Actor]"])
    _generation: int = 0
    _lock: Lock = field(default_factory=Lock)

    def remembered(self, credentials: Credentials, *, changes: bool = False) -> Actor | None:
        """The actor, if known without the database. A token or a session is not if the request `changes` something."""
        now = self.resources.clock()
        if self.single_user:
            return Actor(self.resources.settings.user, now, UNRESTRICTED, source=credentials.source, mints=True)
        until, public = self._public
        if until < time.monotonic():
            return None
        if not (credentials.authorization or credentials.session):
            return _actor(None, now, public, credentials)
        known = self._known.get(credentials.key) if not changes else None
        if known is None or known[0] < time.monotonic() or not _in_force(known[1], now):
            return None
        return _actor(known[1], now, public, credentials)

    async def ask_once(self, credentials: Credentials) -> Actor:
        """Runs `ask` in a thread, for a request that only reads. Concurrent requests of the same caller, such as all
        streams of a token that wake together, share the read."""
        key = credentials.key
        if self.resources.settings.access_cache_s and key in self._asking:
            await asyncio.wait([self._asking[key]])
            if actor := self.remembered(credentials):
                return actor
        asking = self._asking[key] = asyncio.ensure_future(run_in_threadpool(self.ask, credentials))
        asking.add_done_callback(lambda done: self._asking.pop(key) if self._asking.get(key) is done else None)
        return await asyncio.shield(asking)

    def ask(self, credentials: Credentials) -> Actor:
        """The actor, from the database. Raises Unauthenticated for a token or a session that is not in force."""
        generation, now, caller = self._generation, self.resources.clock(), None
        try:
            with self.resources.read() as session:
                public = namespaces.public_names(session)
                if credentials.session:
                    caller = sessions.authenticate(session, credentials.session[:_MAX_TOKEN_CHARACTERS], now)
                elif credentials.authorization:
                    caller = tokens.authenticate(session, _bearer(credentials), now)
        except Unauthenticated:
            with self._lock:
                self._known.pop(credentials.key, None)
            raise
        if caller is not None and tokens.is_first_use(caller, now):
            try:
                with self.resources.write() as session:
                    tokens.record_use(session, caller.token_id, now)
            except Unavailable as error:  # a database that only reads still answers
                log.warning("The use of the token %s was not recorded: %s", caller.token_id, error.detail)
        self._remember(generation, credentials, public, caller)
        return _actor(caller, now, public, credentials)

    def forget(self) -> None:
        """Called after a change of tokens, members or namespaces has been committed."""
        with self._lock:
            self._generation += 1
            self._known.clear()
            self._public = (0.0, frozenset())

    def _remember(
        self, generation: int, credentials: Credentials, public: frozenset[str], caller: Caller | None
    ) -> None:
        until = time.monotonic() + self.resources.settings.access_cache_s
        with self._lock:
            if generation != self._generation:  # the data may be older than the change
                return
            self._public = (until, public)
            if caller is not None:
                self._known[credentials.key] = (until, caller)
                self._known.move_to_end(credentials.key)
            while len(self._known) > MAX_REMEMBERED:
                self._known.popitem(last=False)


def credentials_of(headers: dict[bytes, bytes], client: tuple[str, int] | None) -> Credentials:
    """Credentials of a request: its Authorization header, and its address with the user agent."""
    agent = headers.get(b"user-agent", b"").decode("latin-1")
    source = f"{client[0] if client else 'unknown'} {agent}"
    return Credentials(headers.get(b"authorization", b"").decode("latin-1"), source[:_MAX_SOURCE_CHARACTERS])


def _bearer(credentials: Credentials) -> str:
    scheme, _, text = credentials.authorization.partition(" ")
    if scheme.lower() != "bearer" or len(text) > _MAX_TOKEN_CHARACTERS:
        raise Unauthenticated("token_invalid", "The Authorization header has no token.")
    return text.strip()


def _in_force(caller: Caller, now: datetime) -> bool:
    return caller.expires_at is None or caller.expires_at > now


def _actor(caller: Caller | None, now: datetime, public: frozenset[str], credentials: Credentials) -> Actor:
    if caller is None:
        return Actor(ANONYMOUS, now, {}, public=public, source=credentials.source)
    return Actor(
        caller.user,
        now,
        caller.grants,
        public=public,
        token_id=caller.token_id,
        source=credentials.source,
        mints=caller.mints,
        hidden=caller.hidden,
    )
