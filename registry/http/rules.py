"""The rule of a route, stated as the type of its actor: who may call it. A route without one fails a test.

def yank(named: RepositoryOf, actor: Releaser, ...)   a releaser in the namespace that the path names
def list_bases(actor: Member, ...)                    whoever has a role anywhere
def show_job(actor: Caller, ...)                      the route looks at the row first, then calls `permit`
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, cast

from fastapi import Depends, Request
from starlette.concurrency import run_in_threadpool

from registry.access import Role, permit, permit_somewhere
from registry.audit import Actor
from registry.http.callers import Callers, credentials_of


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
        if self.where is Where.NAMESPACE:
            permit(actor, self.role, request.path_params["namespace"])
        elif self.where is Where.ANYWHERE:
            permit_somewhere(actor, self.role)
        return actor


def callers_of(request: Request) -> Callers:
    return cast(Callers, request.app.state.callers)


async def _callers(request: Request) -> Callers:
    return callers_of(request)


CallersOf = Annotated[Callers, Depends(_callers)]

Reader = Annotated[Actor, Depends(Rule(Where.NAMESPACE, Role.READER))]
Publisher = Annotated[Actor, Depends(Rule(Where.NAMESPACE, Role.PUBLISHER))]
Releaser = Annotated[Actor, Depends(Rule(Where.NAMESPACE, Role.RELEASER))]
Admin = Annotated[Actor, Depends(Rule(Where.NAMESPACE, Role.ADMIN))]
Member = Annotated[Actor, Depends(Rule(Where.ANYWHERE, Role.READER))]
Contributor = Annotated[Actor, Depends(Rule(Where.ANYWHERE, Role.PUBLISHER))]
Caller = Annotated[Actor, Depends(Rule(Where.INSIDE))]

ASKED_AGAIN = Rule(Where.INSIDE)
"""For an answer that goes on: who asks may have lost the token since."""
