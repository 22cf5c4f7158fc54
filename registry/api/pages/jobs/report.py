"""Prepares a conflict report for pages: the composer's view, within the limits of a page, with links in its advice."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast
from urllib.parse import urlencode

from markupsafe import Markup, escape

from composer.conflicts import view
from composer.conflicts.documents import ReportDocument
from registry.api.pages.jobs.chosen import Chosen

Stored = Mapping[str, Any]
"""A report as a worker has stored it."""
OptionAddress = Callable[[str, str], str | None]
"""The address that an option leads to, by its name and value; None for an option that pages do not have."""

MAX_CELLS, MAX_PAIRS, MAX_FINDINGS, MAX_LISTED = 2_000, 30, 40, 10
"""The limits of all maps on a page (40 kB), of the table of pairs (worst first), of findings, and of modules below a
map."""
_OPTION = re.compile(r"--(?:(optimize)(?![\w-])|([a-z-]+) ([\w.:=/*-]*\w))")


def shown(report: Stored | None, address: OptionAddress, measure: str, path: Callable[[str], str]) -> dict[str, Any]:
    """The contents of a report's templates. `path` leads to the page for another measure."""
    measure = measure if measure in view.MEASURES else view.DEFAULT_MEASURE
    return {
        "report": read(report, address) if report else None,
        "maps": maps(report, measure) if report else None,
        "measure": measure,
        "measures": view.MEASURES,
        "addresses": {name: path(name) for name in view.MEASURES},
        "most_listed": MAX_LISTED,
    }


def read(report: Stored, address: OptionAddress) -> view.Report:
    """The view of a report. `address` turns the options that its advice names into links."""
    read = view.read(cast(ReportDocument, report), MAX_PAIRS, MAX_FINDINGS)
    return replace(read, advice=[_linked(text, address) for text in read.advice])


def maps(report: Stored, measure: str) -> view.Maps:
    """The maps of a measure that fit the limits. All have the rows and columns of all adapters."""
    drawn = view.maps(cast(ReportDocument, report), measure)
    frame = [cell for cell in drawn.frame if cell[1] is not None]
    room = MAX_CELLS // max(1, len(frame))
    return replace(drawn, frame=frame, drawn=[drawing for drawing in drawn.drawn if drawing.in_layers][:room])


def _linked(advice: str, address: OptionAddress) -> Markup:
    """Advice with its options as code, and as links if a page has them."""
    parts, end = Markup(), 0
    for option in _OPTION.finditer(advice):
        target = address(option[1] or option[2], option[3] or "")
        code = Markup("<code>{}</code>").format(option[0])
        parts += escape(advice[end : option.start()])
        parts += Markup('<a href="{}">{}</a>').format(target, code) if target else code
        end = option.end()
    return parts + escape(advice[end:])


def options_of(chosen: Chosen) -> OptionAddress:
    """The links of the options in an advice, to a recipe for the chosen adapters with these options."""

    def address(name: str, value: str) -> str | None:
        if name == "method":
            return chosen.with_method(value).address("/compose")
        if name == "set":
            return chosen.with_setting(value).address("/compose")
        others = {"probe": {"probe": value}, "optimize": {"optimize": "yes"}}.get(name)
        return chosen.address("/compose", **others) if others else None

    return address


def options_for(composition_id: int) -> OptionAddress:
    """The address of a composition's recipe with the option."""

    def address(name: str, value: str) -> str | None:
        known = name in ("method", "set", "probe", "optimize")
        query = urlencode({"composition": composition_id, name: value or "yes"}, safe="=")
        return f"/compose?{query}" if known else None

    return address
