"""Model cards: CommonMark without raw HTML, and nothing in the result but text, links and tables."""

import re

import nh3
from markdown_it import MarkdownIt
from markupsafe import Markup

MAX_BYTES = 256 << 10
_TAGS = {
    "a", "blockquote", "br", "code", "del", "em", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre", "strong",
    "table", "tbody", "td", "th", "thead", "tr", "ul",
}  # fmt: skip
_FRONT_MATTER = re.compile(r"\A---[ \t]*\r?\n.*?^(?:---|\.\.\.)[ \t]*\r?$", re.MULTILINE | re.DOTALL)
_ATTRIBUTES = {"a": {"href"}}
_HEADINGS = {f"h{level}": f"h{min(6, level + 2)}" for level in range(1, 7)}
"""The page has a title and sections above the card's."""


def rendered(text: str) -> Markup:
    """The card as HTML. Links lead only to https addresses, images are left out."""
    tokens = _markdown().parse(_FRONT_MATTER.sub("", text))
    for token in tokens:
        token.tag = _HEADINGS.get(token.tag, token.tag)
    html = _markdown().renderer.render(tokens, _markdown().options, {})
    clean = nh3.clean(
        html, tags=_TAGS, attributes=_ATTRIBUTES, url_schemes={"https"}, link_rel="nofollow noopener noreferrer"
    )
    return Markup(clean)  # noqa: S704 - sanitized


def _markdown() -> MarkdownIt:
    return MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
