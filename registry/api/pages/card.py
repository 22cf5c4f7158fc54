"""Model cards: CommonMark with raw HTML as text, and nothing in the result but text, links and tables."""

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import count

import nh3
from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup, escape

MAX_BYTES = 256 << 10
KEPT = 32
"""Cards that stay rendered: 256 kB of brackets take six seconds."""
_TAGS = {
    "a", "blockquote", "br", "code", "del", "em", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre", "strong",
    "table", "tbody", "td", "th", "thead", "tr", "ul",
}  # fmt: skip
_FRONT_MATTER = re.compile(r"\A---[ \t]*\r?\n.*?^(?:---|\.\.\.)[ \t]*\r?$", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
_ATTRIBUTES = {"a": {"href"}}
_HEADINGS = {f"h{level}": f"h{min(6, level + 2)}" for level in range(1, 7)}
"""The page has a title and sections above the card's."""


@lru_cache(KEPT)
def rendered(text: str) -> Markup:
    """The card as HTML. Links keep only addresses by https and those without a scheme; images are left out. HTML in the
    card is shown as it is written, but for comments: those of a template tell the author what to write."""
    tokens = _markdown().parse(_FRONT_MATTER.sub("", text))
    for token in tokens:
        token.tag = _HEADINGS.get(token.tag, token.tag)
    html = _markdown().renderer.render(tokens, _markdown().options, {})
    clean = nh3.clean(
        html, tags=_TAGS, attributes=_ATTRIBUTES, url_schemes={"https"}, link_rel="nofollow noopener noreferrer"
    )
    return Markup(_framed(clean))  # noqa: S704 - sanitized


def _framed(html: str) -> str:
    """Each table in a frame that scrolls, so that a wide one does not widen the page."""
    number = count(1)
    opening = '<div class="scroll" tabindex="0" role="region" aria-label="Table {} of the card"><table>'
    html = re.sub("<table>", lambda _: opening.format(next(number)), html)
    return html.replace("</table>", "</table></div>")


def _markdown() -> MarkdownIt:
    markdown = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    for kind in ("html_block", "html_inline"):
        markdown.add_render_rule(kind, _as_text)
    return markdown


def _as_text(_: object, tokens: Sequence[Token], index: int, *_options: object) -> str:
    return str(escape(_COMMENT.sub("", tokens[index].content)))
