"""Cursors of keyset pagination, and ETags of channels."""

import base64
from collections.abc import Callable, Sequence
from typing import Annotated, TypeVar

from fastapi import Query

from registry.api.http.request import MAX_DIGITS
from registry.domain.channels.moves import NOTHING_YET
from registry.domain.channels.policy.judging import SERVES_NOTHING, Expected
from registry.errors import Usage
from registry.wire.document import Page, Wire

Row = TypeVar("Row")
Item = TypeVar("Item", bound=Wire)

Limit = Annotated[int, Query(ge=1, le=500, description="Items per page.")]
Cursor = Annotated[str | None, Query(max_length=400, description="`next` of the previous page.")]


def encode_cursor(key: str | int) -> str:
    """Encodes a key opaquely: the order of a list may change."""
    return base64.urlsafe_b64encode(str(key).encode()).decode().rstrip("=")


def first_rows(rows: Sequence[Row], limit: int, key: Callable[[Row], str | int]) -> tuple[Sequence[Row], str | None]:
    """The first `limit` rows and the cursor of the next page, None on the last page. `rows` has up to `limit + 1`
    rows, ordered by `key`: the extra row shows that another page follows."""
    return rows[:limit], encode_cursor(key(rows[limit - 1])) if len(rows) > limit else None


def decode_cursor(cursor: str | None) -> str:
    """The text of a cursor; empty for none. Raises Usage for one that no list returned."""
    if not cursor:
        return ""
    try:
        text = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True).decode()
        if "\0" in text:
            raise ValueError
        return text
    except ValueError:  # not ASCII, not base64, not UTF-8
        raise Usage("bad_cursor", f"Invalid cursor {cursor[:80]!r}.", subject=cursor[:80]) from None


def decode_number(cursor: str | None) -> int:
    """The row number of a cursor; 0 for none. Raises Usage for a cursor of another list."""
    text = decode_cursor(cursor) or "0"
    if not text.isdecimal() or len(text) > MAX_DIGITS:
        raise Usage("bad_cursor", f"The cursor {cursor!r} belongs to another list.")
    return int(text)


def page(items: Sequence[Item], limit: int, keys: Sequence[str | int]) -> Page[Item]:
    """A page of `items`, which were queried with `limit + 1`: an extra item means that there is a next page."""
    more = len(items) > limit
    return Page(items=list(items[:limit]), next=encode_cursor(keys[limit - 1]) if more else None)


def etag(move_id: int, served: str | None) -> str:
    """The ETag of a channel: its last move, and the version that it serves, None for nothing. A yank changes that
    without a move."""
    return f'"{move_id}-{served or SERVES_NOTHING}"'


def expected_from(if_match: str | None, if_none_match: str | None) -> Expected | None:
    """Parses preconditions: `If-Match: "17-1.2.0"` is the ETag that was seen last, `"17"` the last move alone;
    `If-None-Match: *` requires a new channel."""
    if if_none_match is not None:
        if if_none_match.strip() != "*":
            raise Usage(
                "bad_precondition",
                "If-None-Match accepts only * here.",
                next_step="Send *, or If-Match with the ETag of GET channels/{channel}.",
            )
        return Expected(NOTHING_YET)
    if if_match is None or if_match.strip() == "*":
        return None
    move, _, served = if_match.strip().removeprefix("W/").strip('"').partition("-")
    if not move.isdecimal() or len(move) > MAX_DIGITS:
        raise Usage("bad_precondition", f"If-Match {if_match[:40]!r} is not the ETag of a channel.")
    return Expected(int(move), served or None)
