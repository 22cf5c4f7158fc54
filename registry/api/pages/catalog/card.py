"""Renders model cards: CommonMark with raw HTML shown as text. The result contains only text, links and tables."""

import logging
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from itertools import count
from threading import Lock
from typing import Any

import nh3
from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup, escape

from registry.errors import RegistryError
from registry.errors.outages import OutageLog
from registry.formats.references import Digest

MAX_BYTES = 256 << 10
MAX_MARKS = 10_000
"""The most lines, cells and delimiters in a card; the most links are a fifth of it. A card of 100 kB has a third of
this."""
MAX_STEPS = 10_000
"""The most attempts to begin an element, between lines and within them. A card of 60 kB needs 5,000; 250 kB of brackets
would need 500,000, and five seconds."""
KEPT, ROOM = 64, 4
"""The number of rendered cards to keep, and of cards that may wait for the rendering thread."""
_TAGS = {
    "a", "blockquote", "br", "code", "del", "em", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre", "strong",
    "table", "tbody", "td", "th", "thead", "tr", "ul",
}  # fmt: skip
_FRONT_MATTER = re.compile(r"\A---[ \t]*\r?\n.*?^(?:---|\.\.\.)[ \t]*\r?$", re.MULTILINE | re.DOTALL)
_LINE_END = re.compile(r"\r\n?|\n")
_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
_ATTRIBUTES = {"a": {"href"}}
_HEADINGS = {f"h{level}": f"h{min(6, level + 2)}" for level in range(1, 7)}
"""The page has a title and sections above the card's."""


READERS, PATIENCE_S = 4, 2.0
"""The number of threads that read cards from the store, and how long a page waits for one. Otherwise, pages need only
the database."""
_outages = OutageLog(logging.getLogger(__name__))


class _TooMany(Exception):
    """A card exceeds the budget."""


class Cards:
    """Renders each card once, in its own thread. The card's digest identifies the result, since a process's renderer
    does not change."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "cards")
        self._readers = ThreadPoolExecutor(READERS, "card-readers")
        self._kept: OrderedDict[Digest, Future[Markup]] = OrderedDict()
        self._lock = Lock()

    def show(self, sha256: Digest, read: Callable[[], str]) -> Markup | None:
        """The rendered card with that digest; `read` returns its text. Plain text if too many other cards are waiting;
        None if the store is unreachable or slow, or has lost the card."""
        with self._lock:
            rendering = self._kept.get(sha256)
        if rendering is not None:
            return rendering.result()
        text = self._read(sha256, read)
        if text is None:
            return None
        with self._lock:
            rendering = self._kept.get(sha256) or self._begin(sha256, text)
        return rendering.result() if rendering is not None else plain(text)

    def _read(self, sha256: Digest, read: Callable[[], str]) -> str | None:
        reading = self._readers.submit(read)
        try:
            return reading.result(PATIENCE_S)
        except (RegistryError, OSError) as error:  # TimeoutError among them
            reading.cancel()
            _outages.warn(f"the card {sha256[:12]} cannot be read", error or "the store does not answer in time")
            return None

    def _begin(self, sha256: Digest, text: str) -> Future[Markup] | None:
        if sum(not future.done() for future in self._kept.values()) > ROOM:
            return None
        rendering = self._kept[sha256] = self._thread.submit(rendered, text)
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return rendering


def plain(text: str) -> Markup:
    """The card as its author wrote it."""
    return Markup('<pre class="scroll" tabindex="0">{}</pre>').format(text)


def rendered(text: str) -> Markup:
    """The card as HTML. Links keep only https addresses and paths of this server; images are dropped. HTML in the card
    is shown as text, except comments, which in templates are instructions to the author. A card that exceeds the budget
    is shown as plain text."""
    markdown, source = _markdown(), _FRONT_MATTER.sub("", text)
    try:
        _refuse_many_marks(source)
        tokens = markdown.parse(source, {"steps": MAX_STEPS})
    except _TooMany:
        return plain(source)
    for token in tokens:
        token.tag = _HEADINGS.get(token.tag, token.tag)
    html = markdown.renderer.render(tokens, markdown.options, {})
    clean = nh3.clean(
        html,
        tags=_TAGS,
        attributes=_ATTRIBUTES,
        attribute_filter=_own_path_or_https,
        url_schemes={"https"},
        link_rel="nofollow noopener noreferrer",
    )
    return Markup(_framed(clean))  # noqa: S704 - sanitized


def _own_path_or_https(_tag: str, _attribute: str, value: str) -> str | None:
    """Returns the address; None for `//host/path`, which leads to another server with the page's scheme. Browsers treat
    a backslash like a slash, and skip blanks."""
    return None if re.match(r"[\s\x00-\x20]*[/\\][\s\x00-\x20]*[/\\]", value) else value


def _refuse_many_marks(source: str) -> None:
    """Raises _TooMany for what costs time but no step: cells (including those missing from short rows), delimiters and
    addresses."""
    lines = _LINE_END.split(source)
    cells = max((line.count("|") for line in lines), default=0) * len(lines)
    marks = len(lines) + sum(map(source.count, "|*_~")) + 5 * (source.count("<") + source.count("]("))
    if max(marks, cells // 2) > MAX_MARKS:
        raise _TooMany


def _framed(html: str) -> str:
    """Puts each table into a scrolling frame, so that a wide one does not widen the page."""
    number = count(1)
    opening = '<div class="scroll" tabindex="0" role="region" aria-label="Table {} of the card"><table>'
    html = re.sub("<table>", lambda _: opening.format(next(number)), html)
    return html.replace("</table>", "</table></div>")


@cache
def _markdown() -> MarkdownIt:
    markdown = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    markdown.block.ruler.before(
        "table",
        "steps",
        lambda state, _start, _end, _silent: _spend(state.env),
        {"alt": ["paragraph", "reference", "blockquote", "list"]},
    )
    markdown.inline.ruler.before("text", "steps", lambda state, _silent: _spend(state.env))
    for kind in ("html_block", "html_inline"):
        markdown.add_render_rule(kind, _as_text)
    return markdown


def _spend(environment: Any) -> bool:
    """A rule that only counts and never matches."""
    environment["steps"] -= 1
    if environment["steps"] < 0:
        raise _TooMany
    return False


def _as_text(_: object, tokens: Sequence[Token], index: int, *_options: object) -> str:
    return str(escape(_COMMENT.sub("", tokens[index].content)))
