"""Channel moves, each made exactly once however often the request is retried."""

import time
from collections.abc import Callable
from contextlib import suppress

from registry.client.api import Api, Json
from registry.client.retries import pauses, send_once, with_retries
from registry.errors import Unavailable
from registry.errors.translation import of_row

_POLL_S = 0.5


def promote(api: Api, release: Json, channel: str, reason: str = "", *, force: bool = False) -> tuple[Json, str | None]:
    """Promotes `release`, as the API shows it. Returns the move, or the promotion that waits, which has a `state`. Also
    returns the version that the channel is at if a response was lost and others have moved it since."""
    path = f"/v1/{release['kind']}s/{release['repository']}/channels/{channel}"
    body = {"version": release["version"], "reason": reason, "force": force}
    return _moved(api, path, f"{release['repository']}@{channel}", lambda headers: api.put(path, body, headers))


def wait_for(api: Api, promotion: Json, kind: str, seen: Callable[[Json], None] = lambda _promotion: None) -> Json:
    """Waits until a promotion ends; returns its move. `kind` is its release's; `seen` gets the promotion at each look.
    Raises the error that ended it without a move."""
    path = f"/v1/{kind}s/{promotion['repository']}/channels/{promotion['channel']}"
    while promotion["state"] == "pending":
        time.sleep(_POLL_S)
        promotion = api.get(f"{path}/promotions/{promotion['id']}")
        seen(promotion)
    if promotion["state"] != "completed":
        raise of_row(promotion["error"])
    return next(move for move in api.pages(f"{path}/history") if move["id"] == promotion["move"])


def roll_back(api: Api, line: str, channel: str, body: Json) -> tuple[Json, str | None]:
    """Rolls back, returning as `promote` does; `line` is the repository's route."""
    path = f"{line}/channels/{channel}"
    full = f"{'/'.join(line.split('/')[-2:])}@{channel}"
    return _moved(api, path, full, lambda headers: api.post(f"{path}/rollback", body, headers))


def _moved(api: Api, path: str, full: str, ask: Callable[[dict[str, str]], Json]) -> tuple[Json, str | None]:
    move, lost = send_once(ask, f"adaptory history {full}")
    if not lost or "state" in move:
        return move, None
    with suppress(Unavailable):  # the move was made in any case
        now = with_retries(lambda: api.get(path), pauses())
        if now["move"] > move["id"]:
            return move, now["version"] or "no release that is not yanked"
    return move, None
