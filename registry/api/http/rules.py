"""Access rules: the type of a route's actor decides who may call it. A test fails for a route without one.

def yank(named: RepositoryOf, actor: Releaser, ...)   releasers of the namespace in the path
def list_bases(actor: Member, ...)                    anyone with a role in any namespace
def show_job(actor: Caller, ...)                      the route loads the row first, then calls `permit`
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, cast

from anyio import from_thread
from fastapi import Depends, Request
from fastapi.dependencies.models import Dependant
from starlette.concurrency import run_in_threadpool

from registry.api.http.callers import ActorCache, Credentials, credentials_of
from registry.api.http.exchanges import current
from registry.api.http.request import SAFE_METHODS, body_chunks, content_length
from registry.domain.access.audit import Actor
from registry.domain.access.roles import EVERYWHERE, Role, permit, permit_somewhere
from registry.errors import TooLarge

MAX_STRANGERS_BYTES = 64 << 10


class Where(StrEnum):
    NAMESPACE = "the namespace of the path"
    ANYWHERE = "any namespace"
    REGISTRY = "the whole registry"
    INSIDE = "decided by the route"


@dataclass(frozen=True, slots=True)
class Rule:
    """Identifies and authorizes the caller. Asynchronous: the actor is usually cached, and a thread would cost more."""

    where: Where
    role: Role = Role.READER
    changes: bool = False
    """Whether even a GET of the route changes something."""

    async def __call__(self, request: Request) -> Actor:
        return await self._permitted(request, changes=self.changes or request.method not in SAFE_METHODS)

    async def _permitted(self, request: Request, *, changes: bool) -> Actor:
        callers = callers_of(request)
        credentials = self.credentials(request)
        actor = callers.remembered(credentials, changes=changes)
        if actor is None and changes:
            actor = await run_in_threadpool(callers.ask, credentials)
        elif actor is None:
            actor = await callers.ask_once(credentials)
        request.state.actor = actor  # for errors that suggest alternatives
        if (exchange := current.get()) is not None:
            exchange.actor = actor.name
        if self.where is Where.NAMESPACE:
            parts = [request.path_params.get(part) for part in ("namespace", "name")]
            permit(actor, self.role, "/".join(filter(None, parts)))
        elif self.where is Where.ANYWHERE:
            permit_somewhere(actor, self.role)
        elif self.where is Where.REGISTRY:
            permit(actor, self.role, EVERYWHERE)
        return actor

    def chunks(self, request: Request) -> Iterator[bytes]:
        """The body, as `body_chunks`. Raises at its end, possibly hours later, if the caller has lost the token or the
        role meanwhile.
        """
        yield from body_chunks(request)
        from_thread.run(self, request)

    def credentials(self, request: Request) -> Credentials:
        """The caller by the Authorization header."""
        client = cast(tuple[str, int] | None, request.scope.get("client"))
        return credentials_of(dict(request.scope["headers"]), client)

    async def before_document(self, request: Request) -> None:
        """Authorizes before the body is read, since its values occupy many times its size in memory. Where the route
        authorizes by the body itself, callers without any role may send only a short one."""
        actor = await self._permitted(request, changes=False)
        if not actor.grants and content_length(request) > MAX_STRANGERS_BYTES:
            message = f"The body is longer than {MAX_STRANGERS_BYTES:,} bytes, the limit for callers without a role."
            raise TooLarge("body_too_large", message)


def rules_of(dependant: Dependant) -> list[Rule]:
    """All rules among a route's dependencies, at any depth."""
    own = [child.call for child in dependant.dependencies if isinstance(child.call, Rule)]
    return own + [rule for child in dependant.dependencies for rule in rules_of(child)]


def callers_of(request: Request) -> ActorCache:
    return cast(ActorCache, request.app.state.callers)


async def _callers(request: Request) -> ActorCache:
    return callers_of(request)


CallersOf = Annotated[ActorCache, Depends(_callers)]

Reader = Annotated[Actor, Depends(Rule(Where.NAMESPACE, Role.READER))]
PUBLISHES = Rule(Where.NAMESPACE, Role.PUBLISHER)
Publisher = Annotated[Actor, Depends(PUBLISHES)]
Agent = Annotated[Actor, Depends(Rule(Where.NAMESPACE, Role.AGENT))]
Releaser = Annotated[Actor, Depends(Rule(Where.NAMESPACE, Role.RELEASER))]
Admin = Annotated[Actor, Depends(Rule(Where.NAMESPACE, Role.ADMIN))]
Member = Annotated[Actor, Depends(Rule(Where.ANYWHERE, Role.READER))]
Contributor = Annotated[Actor, Depends(Rule(Where.ANYWHERE, Role.PUBLISHER))]
AdminSomewhere = Annotated[Actor, Depends(Rule(Where.ANYWHERE, Role.ADMIN))]
RegistryAdmin = Annotated[Actor, Depends(Rule(Where.REGISTRY, Role.ADMIN))]
Caller = Annotated[Actor, Depends(Rule(Where.INSIDE))]

ASKED_AGAIN = Rule(Where.INSIDE)
"""For streaming responses: the caller's token may have been revoked since."""
