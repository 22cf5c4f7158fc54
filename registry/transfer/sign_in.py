"""Signs users in to pages: begins a session, and leaves an audit row for every refusal."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from sqlalchemy.orm import Session

from registry.database.tables import Token
from registry.domain.access import audit, sessions, tokens
from registry.domain.access.audit import Act, Actor, RefusalBudget
from registry.domain.access.roles import ANONYMOUS
from registry.errors import Refused, RegistryError
from registry.transfer.openid import Attempt, OpenIdProvider
from registry.transfer.resources import Resources


@dataclass(frozen=True, slots=True)
class SignedIn:
    """A session that has begun. `secret` goes into its cookie, and is stored nowhere else."""

    user: str
    secret: str
    expires_at: datetime | None


@dataclass(slots=True)
class SignIn:
    """Signs users in; one instance per process."""

    resources: Resources
    provider: OpenIdProvider | None = None
    _refusals: RefusalBudget = field(default_factory=RefusalBudget)

    def with_token(self, text: str, before: Actor) -> SignedIn:
        """Begins a session with a token, and ends the request's previous one. Raises Unauthenticated for
        anything but a token in force, and NotAllowed for one of continuous integration."""
        try:
            with self.resources.read() as session:  # invalid tokens need no write lock
                tokens.authenticate(session, text, before.at)
            return self._begin(before, lambda session, actor: sessions.begin_with_token(session, actor, text))
        except RegistryError as error:
            self._record(before, error)
            raise

    def with_provider(self, attempt: Attempt, answer: Mapping[str, str], redirect_uri: str, before: Actor) -> SignedIn:
        """Begins a session of the user identified by the provider's answer, as `with_token` does. Raises
        Unauthenticated for an invalid answer, NotAllowed for the name of another user here, and Unavailable if the
        provider cannot be reached."""
        assert self.provider is not None  # noqa: S101
        try:
            known = self.provider.identify(attempt, answer, redirect_uri, before.at)
            return self._begin(
                before, lambda session, actor: sessions.begin_with_roles(session, actor, known.person, known.roles)
            )
        except RegistryError as error:
            self._record(before, error)
            raise

    def logged_out(self, text: str, source: str) -> int:
        """Ends the sessions that the provider began for the person whom a logout token names, and returns their number.
        Raises Unauthenticated for a token that is not valid here, or was sent before, and Refused without a
        provider."""
        actor = Actor(ANONYMOUS, self.resources.clock(), {}, source=source)
        if self.provider is None:
            raise Refused("sign_in_disabled", "This registry has no OpenID provider.")
        try:
            gone = self.provider.logged_out(text, actor.at)
            with self.resources.write() as session:
                tokens.use_once(session, gone.replay_key, gone.expires_at, actor.at)
                return sessions.end_of_person(session, actor, gone.issuer, gone.subject)
        except RegistryError as error:
            self._record(actor, error)
            raise

    def _begin(self, before: Actor, begin: Callable[[Session, Actor], tuple[Token, str]]) -> SignedIn:
        with self.resources.write() as session:
            row, secret = begin(session, _anonymous(before))
            sessions.end(session, before)
            return SignedIn(row.user, secret, row.expires_at)

    def _record(self, before: Actor, error: RegistryError) -> None:
        if self._refusals.spend():
            with self.resources.write() as session:
                actor, code = _anonymous(before), error.code
                audit.record(
                    session, actor, Act.SESSION_REFUSE, "sign-in", namespace=None, reason=error.detail, code=code
                )


def _anonymous(before: Actor) -> Actor:
    return Actor(ANONYMOUS, before.at, {}, source=before.source)
