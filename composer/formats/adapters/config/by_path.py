"""Values by patterns of module paths (`rank_pattern` and the like): PEFT's first matching pattern decides.

Tried one after the other, as PEFT does, 500 patterns for 500 modules took minutes, and a mixture of experts may have
one for each of 50,000. Nearly all are plain paths. These are kept in a tree here, from their last component on; only
the others are tried in turn.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from composer.formats.adapters.config.patterns import MAX_PATTERN_CHARS, matches_end

_Value = TypeVar("_Value")
_Default = TypeVar("_Default")
_PLAIN = re.compile(r"(\^?)((?:[\w.-]|\\\.)+?)\$?")
_ANY = re.compile(r"(?<!\\)\.")  # a dot is any character, as in every regular expression


@dataclass(slots=True)
class _Node:
    """A node of the tree. The path that leads here ends with each of `patterns` (its number, and whether it must be the
    full path); before it there may be, after any character, a child's name."""

    children: dict[str, "_Node"] = field(default_factory=dict[str, "_Node"])
    lengths: set[int] = field(default_factory=set[int])
    patterns: list[tuple[int, bool]] = field(default_factory=list[tuple[int, bool]])


def is_plain(pattern: str) -> bool:
    """Whether the pattern is a plain path, without alternatives or repetition, so that it is valid as it stands."""
    return _plain(pattern) is not None


def _plain(pattern: str) -> re.Match[str] | None:
    return _PLAIN.fullmatch(pattern) if len(pattern) <= MAX_PATTERN_CHARS else None


class ByPath(Mapping[str, _Value]):
    """A mapping from patterns to values; their order decides."""

    def __init__(self, values: Mapping[str, _Value]) -> None:
        self._values = dict(values)
        self._names = [*values]
        self._root = _Node()
        self._others = [(number, name) for number, name in enumerate(self._names) if not self._planted(number, name)]

    def __getitem__(self, pattern: str) -> _Value:
        return self._values[pattern]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def first(self, path: str, default: _Default) -> _Value | _Default:
        """The value of the first pattern that matches the full path, or its end after a dot."""
        number = min(self._holding(path), default=None)
        return default if number is None else self._values[self._names[number]]

    def unused(self, paths: Iterable[str]) -> list[str]:
        """The patterns that match none of the paths."""
        used = {number for path in paths for number in self._holding(path)}
        return [name for number, name in enumerate(self._names) if number not in used]

    def _planted(self, number: int, pattern: str) -> bool:
        plain = _plain(pattern)
        if plain is None:
            return False
        node = self._root
        for part in reversed(_ANY.split(plain[2])):
            name = part.replace("\\.", ".")
            node.lengths.add(len(name))
            node = node.children.setdefault(name, _Node())
        node.patterns.append((number, bool(plain[1])))
        return True

    def _holding(self, path: str) -> Iterator[int]:
        yield from (number for number, pattern in self._others if matches_end(pattern, path))
        nodes = [(self._root, len(path))]
        while nodes:
            node, end = nodes.pop()
            for length in node.lengths:
                child = node.children.get(path[end - length : end]) if length <= end else None
                if child is None:
                    continue
                begin = end - length
                if begin:
                    nodes.append((child, begin - 1))
                full, at_a_dot = begin == 0, begin > 0 and path[begin - 1] == "."
                yield from (number for number, anchored in child.patterns if full or (at_a_dot and not anchored))
