"""Channel moves, each made exactly once however often the request is retried."""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial

from registry.client.api import Api, read
from registry.client.retries import pauses, send_once, with_retries
from registry.errors import Unavailable
from registry.errors.translation import of_row
from registry.wire.catalog import NamedRelease
from registry.wire.quality import ChannelOut, MoveOut, PromotionOut

_POLL_S = 0.5


def promote(
    api: Api, release: NamedRelease, channel: str, reason: str = "", *, force: bool = False
) -> tuple[MoveOut | PromotionOut, str | None]:
    """Promotes the release. Returns the move, or the promotion that waits. Also returns the version that the channel is
    at if a response was lost and others have moved it since."""
    path = f"{release.line}/channels/{channel}"
    body = {"version": release.version, "reason": reason, "force": force}

    def ask(headers: dict[str, str]) -> MoveOut | PromotionOut:
        document = api.put(path, body, headers=headers)
        return read(PromotionOut if "state" in document else MoveOut, path, document)

    answer, lost = send_once(ask, f"adaptory history {release.repository}@{channel}")
    return answer, _since(api, path, answer) if lost and isinstance(answer, MoveOut) else None


def wait_for(
    api: Api, promotion: PromotionOut, kind: str, seen: Callable[[PromotionOut], None] = lambda _promotion: None
) -> MoveOut:
    """Waits until a promotion ends; returns its move. `kind` is its release's; `seen` gets the promotion at each look.
    Raises the error that ended it without a move."""
    path = f"/v1/{kind}s/{promotion.repository}/channels/{promotion.channel}"
    while promotion.state == "pending":
        time.sleep(_POLL_S)
        promotion = api.get(f"{path}/promotions/{promotion.id}", PromotionOut)
        seen(promotion)
    if promotion.error is not None:
        raise of_row(promotion.error)
    return next(move for move in api.pages(f"{path}/history", MoveOut) if move.id == promotion.move)


def roll_back(api: Api, line: str, channel: str, body: Mapping[str, object]) -> tuple[MoveOut, str | None]:
    """Rolls back, returning as `promote` does; `line` is the repository's route."""
    path = f"{line}/channels/{channel}"
    full = f"{'/'.join(line.split('/')[-2:])}@{channel}"
    ask = partial(api.post, f"{path}/rollback", body, MoveOut)
    move, lost = send_once(ask, f"adaptory history {full}")
    return move, _since(api, path, move) if lost else None


def _since(api: Api, path: str, move: MoveOut) -> str | None:
    """The channel's current state, if others have moved it after this move."""
    with suppress(Unavailable):  # the move was made in any case
        now = with_retries(lambda: api.get(path, ChannelOut), pauses())
        if now.move > move.id:
            return now.version or "no release that is not yanked"
    return None
