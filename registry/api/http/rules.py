"""The rule of a route, stated as the type of its actor: who may call it. A route without one fails a test.

def yank(named: RepositoryOf, actor: Releaser, ...)   a releaser in the namespace that the path names
def list_bases(actor: Member, ...)                    whoever has a role anywhere
def show_job(actor: Caller, ...)                      the route looks at the row first, then calls `permit`
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, cast

from fastapi import Depends, Request
from fastapi.dependencies.models import Dependant
from starlette.concurrency import run_in_threadpool

from registry.api.http.callers import ActorCache, credentials_of
from registry.api.http.exchanges import current
from registry.api.http.request import content_length
from registry.domain.access.audit import Actor
from registry.domain.access.roles import Role, permit, permit_somewhere
from registry.errors import TooLarge

MAX_STRANGERS_BYTES = 64 << 10


class Where(StrEnum):
    NAMESPACE = "the namespace of the path"
    ANYWHERE = "any namespace"
    INSIDE = "decided by the route"


@dataclass(frozen=True, slots=True)
class Rule:
    """Asynchronous, since who asks is mostly remembered: a hop to a thread costs more than the answer."""

    where: Where
    role: Role = Role.READER

    async def __call__(self, request: Request) -> Actor:
        callers = callers_of(request)
        client = cast(tuple[str, int] | None, request.scope.get("client"))
        credentials = credentials_of(dict(request.scope["headers"]), client)
        actor = callers.remembered(credentials) or await run_in_threadpool(callers.ask, credentials)
        request.state.actor = actor  # for an error that says what else there is
        if (exchange := current.get()) is not None:
            exchange.actor = actor.name
        if self.where is Where.NAMESPACE:
            permit(actor, self.role, request.path_params["namespace"])
        elif self.where is Where.ANYWHERE:
            permit_somewhere(actor, self.role)
        return actor

    async def before_document(self, request: Request) -> None:
        """The same before a document is read, whose values take many times its bytes in memory. Where the route looks
        at the thing first, it is in the document: who has no role at all may send a short one."""
        actor = await self(request)
        if not actor.grants and content_length(request) > MAX_STRANGERS_BYTES:
            message = (
                f"The body is longer than the {MAX_STRANGERS_BYTES:,} bytes that are read of a caller without any role."
            )
            raise TooLarge("body_too_large", message, next_step="Use a token that has a role; see ADAPTORY_TOKEN.")


def rules_of(dependant: Dependant) -> list[Rule]:
    """Those that a route asks, at whatever depth."""
    own = [child.call for child in dependant.dependencies if isinstance(child.call, Rule)]
    return own + [rule for child in dependant.dependencies for rule in rules_of(child)]


def callers_of(request: Request) -> ActorCache:
    return cast(ActorCache, request.app.state.callers)


async def _callers(request: Request) -> ActorCache:
    return callers_of(request)


CallersOf = Annotated[ActorCache, Depends(_callers)]

Reader = Annotated[Actor, Depends(Rule(Where.NAMESPACE, Role.READER))]
Publisher = Annotated[Actor, Depends(Rule(Where.NAMESPACE, Role.PUBLISHER))]
Releaser = Annotated[Actor, Depends(Rule(Where.NAMESPACE, Role.RELEASER))]
Admin = Annotated[Actor, Depends(Rule(Where.NAMESPACE, Role.ADMIN))]
Member = Annotated[Actor, Depends(Rule(Where.ANYWHERE, Role.READER))]
Contributor = Annotated[Actor, Depends(Rule(Where.ANYWHERE, Role.PUBLISHER))]
AdminSomewhere = Annotated[Actor, Depends(Rule(Where.ANYWHERE, Role.ADMIN))]
Caller = Annotated[Actor, Depends(Rule(Where.INSIDE))]

ASKED_AGAIN = Rule(Where.INSIDE)
"""For an answer that goes on: who asks may have lost the token since."""
