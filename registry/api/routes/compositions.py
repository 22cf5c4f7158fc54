"""Compositions: create, show, follow, cancel. A worker does the work itself."""

from functools import partial

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from composer.formats.recipes.recipe import Recipe, parse_recipe
from registry.api.http.events import EVENTS, LastEventId, stream
from registry.api.http.request import ResourcesOf, RowId
from registry.api.http.routes import Route
from registry.api.http.rules import Caller
from registry.api.routes.views import composition_documents, composition_view
from registry.domain.access.audit import Actor
from registry.domain.access.roles import permit
from registry.domain.compositions import compositions
from registry.domain.jobs.queue import PLAIN, Wish
from registry.environment.settings import Settings
from registry.formats.signatures import own_fingerprint
from registry.transfer.resources import Resources
from registry.wire.work import CompositionIn, CompositionOut

router = APIRouter(prefix="/v1/compositions", tags=["compositions"], route_class=Route)


def signer_of(settings: Settings) -> str | None:
    """The fingerprint of the key that signs compositions."""
    return own_fingerprint(settings.signing_key) if settings.signing_key else None


@router.post("", status_code=202)
def create(body: CompositionIn, resources: ResourcesOf, actor: Caller) -> CompositionOut:
    """Resolve and lock a recipe immediately; its steps wait for a worker. Even a plan requires the publisher role."""
    wish = Wish(priority=body.priority, memory_bytes=body.memory_bytes)
    return create_composition(resources, actor, parse_recipe(body.recipe), plan_only=body.plan, wish=wish)


def create_composition(
    resources: Resources, actor: Actor, recipe: Recipe, *, plan_only: bool, wish: Wish = PLAIN
) -> CompositionOut:
    """A new composition, whose steps wait for a worker. Raises unless the actor has the roles that it needs."""
    for role, namespace in compositions.roles_needed(recipe):
        permit(actor, role, namespace)
    with resources.write() as session:
        composition = compositions.create(
            session,
            actor,
            recipe,
            plan_only=plan_only,
            signer=signer_of(resources.settings),
            enabled=resources.settings.enabled_scorers.names,
            wish=wish,
        )
        return composition_view(*compositions.find(session, composition.id))


@router.get("/{composition_id}")
def show(composition_id: RowId, resources: ResourcesOf, actor: Caller) -> CompositionOut:
    return _look(resources, actor, composition_id)


@router.get("/{composition_id}/events", response_class=StreamingResponse, responses=EVENTS)
async def follow(
    composition_id: RowId, resources: ResourcesOf, actor: Caller, request: Request, last_event_id: LastEventId = None
) -> Response:
    """Server-sent events: the composition on every change until it finishes, after the one of `Last-Event-ID`, and a
    comment after 25 seconds without changes. 204 if that was the last."""
    look = partial(_look, resources, composition_id=composition_id)
    return await stream(request, actor, look, composition_documents, composition_id, last_event_id)


@router.post("/{composition_id}/cancel")
def cancel(composition_id: RowId, resources: ResourcesOf, actor: Caller) -> CompositionOut:
    with resources.write() as session:
        pair = compositions.find(session, composition_id)
        compositions.permit_look(actor, *pair, hidden=compositions.unknown(composition_id))
        return composition_view(*compositions.cancel(session, actor, composition_id))


def _look(resources: Resources, actor: Actor, composition_id: int) -> CompositionOut:
    with resources.read() as session:
        pair = compositions.find(session, composition_id)
        compositions.permit_look(actor, *pair, hidden=compositions.unknown(composition_id))
        return composition_view(*pair)
