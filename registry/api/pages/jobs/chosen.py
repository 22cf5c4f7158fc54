"""Adapters chosen to be combined, as page addresses write them:
`/conflicts?with=acme/sql@prod*0.8&with=acme/docs:1.0.0&method=ties&set=density=0.4`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self
from urllib.parse import urlencode

DEFAULT_METHOD = "stack"
Fields = Sequence[tuple[str, str]]
"""The names and values of a query or a form, in order."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """`members` are references with their weights, and `settings` are NAME=VALUE, both as they were written."""

    members: tuple[tuple[str, str], ...] = ()
    method: str = DEFAULT_METHOD
    settings: tuple[str, ...] = ()

    @classmethod
    def of_address(cls, fields: Fields) -> Self:
        given = dict(fields)
        return cls(
            members=tuple(_member(value) for name, value in fields if name == "with" and value.strip()),
            method=given.get("method") or DEFAULT_METHOD,
            settings=tuple(value for name, value in fields if name == "set" and value),
        )

    @classmethod
    def of_form(cls, fields: Fields) -> Self:
        """Reads `adapter` and `weight` of each row, and `settings` separated by spaces. Omits rows without an adapter,
        and the row with the number `drop`."""
        given = dict(fields)
        rows = zip(values_of(fields, "adapter"), values_of(fields, "weight"), strict=False)
        return cls(
            members=tuple(
                (adapter.strip(), weight.strip() or "1")
                for number, (adapter, weight) in enumerate(rows)
                if adapter.strip() and str(number) != given.get("drop")
            ),
            method=given.get("method") or DEFAULT_METHOD,
            settings=tuple(given.get("settings", "").split()),
        )

    def document(self) -> dict[str, object]:
        """The body of a conflict check of REST. A weight that is not a number stays text, which REST refuses."""
        settings = {name: value for name, _, value in (setting.partition("=") for setting in self.settings)}
        inputs = [{"adapter": adapter, "weight": _number(weight)} for adapter, weight in self.members]
        return {"inputs": inputs, "method": self.method, "settings": settings}

    def address(self, path: str, **others: str) -> str:
        """The address of this choice on a page."""
        parameters = [("with", adapter if weight == "1" else f"{adapter}*{weight}") for adapter, weight in self.members]
        if self.method != DEFAULT_METHOD:
            parameters.append(("method", self.method))
        parameters += [("set", setting) for setting in self.settings]
        parameters += others.items()
        return f"{path}?{urlencode(parameters, safe='/:@*=,^')}" if parameters else path

    def with_method(self, method: str) -> Self:
        """This choice with another method, without the settings of the current one."""
        return replace(self, method=method, settings=())

    def with_setting(self, setting: str) -> Self:
        """This choice with the setting NAME=VALUE, which replaces any other value of NAME."""
        others = [other for other in self.settings if other.partition("=")[0] != setting.partition("=")[0]]
        return replace(self, settings=(*others, setting))


def values_of(fields: Fields, name: str) -> list[str]:
    return [value for field, value in fields if field == name]


def _member(text: str) -> tuple[str, str]:
    """`acme/sql@prod*0.8`; a range may end in `*` too."""
    adapter, star, weight = text.strip().rpartition("*")
    return (adapter, weight) if star and adapter and isinstance(_number(weight), float) else (text.strip(), "1")


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
