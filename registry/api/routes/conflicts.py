"""/v1/conflicts: comparisons of adapters from their weights, by a worker."""

from fastapi import APIRouter, Response

from composer.formats.recipes.lock import Lock
from composer.formats.recipes.recipe import Recipe, parse_recipe
from registry.api.http.request import ResourcesOf, RowId
from registry.api.http.routes import Route
from registry.api.http.rules import Caller
from registry.api.routes.views import conflicts_view
from registry.domain.access.audit import Actor
from registry.domain.access.roles import Role, permit
from registry.domain.compositions import checks, locking
from registry.domain.jobs.queue import FINISHED
from registry.formats.references import parse_reference
from registry.transfer.resources import Resources
from registry.wire.work import ConflictsIn, ConflictsOut

router = APIRouter(prefix="/v1/conflicts", tags=["compositions"], route_class=Route)


@router.post("", status_code=202, responses={200: {"model": ConflictsOut}})
def request(body: ConflictsIn, resources: ResourcesOf, actor: Caller, response: Response) -> ConflictsOut:
    """The conflict report of adapters from their weights, without a measurement: 200 with the kept one, 202 while a
    worker computes it. Needs the role reader for each adapter. The same adapters, weights, method and settings get the
    same report, which is kept for 30 days."""
    lock, view = last_check(resources, actor, body)
    if view is None or view.state in checks.ANEW:
        view = request_check(resources, actor, lock)
    response.status_code = 200 if view.state in FINISHED else 202
    return view


@router.get("/{check_id}")
def show(check_id: RowId, resources: ResourcesOf, actor: Caller) -> ConflictsOut:
    """Show a conflict check, with its report once it is done. For readers of all its adapters."""
    with resources.read() as session:
        return conflicts_view(session, checks.find(session, actor, check_id))


def last_check(resources: Resources, actor: Actor, body: ConflictsIn) -> tuple[Lock, ConflictsOut | None]:
    """The adapters to combine, and their latest check, also one that failed. Raises as `permit` unless the actor may
    read each adapter, and as `locking.resolve_inputs` for adapters that cannot be combined."""
    recipe = recipe_of(body)
    for source in recipe.inputs:
        permit(actor, Role.READER, parse_reference(source.adapter).repository.namespace)
    with resources.snapshot() as session:
        lock = locking.lock_inputs(session, recipe, *locking.resolve_inputs(session, recipe))
        check = checks.find_last(session, lock)
        return lock, conflicts_view(session, check) if check else None


def request_check(resources: Resources, actor: Actor, lock: Lock) -> ConflictsOut:
    """The kept check of these inputs or a new one, which waits for a worker."""
    with resources.write() as session:
        return conflicts_view(session, checks.request(session, actor, lock))


def recipe_of(body: ConflictsIn) -> Recipe:
    """The recipe of the combination. Raises InvalidFile naming the field."""
    inputs = [member.model_dump(exclude_unset=True) for member in body.inputs]
    return parse_recipe({"inputs": inputs, "method": body.method, "settings": body.settings}, "conflicts")
