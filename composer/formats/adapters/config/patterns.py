"""Untrusted regular expressions, matched without backtracking: the work is bounded by the two lengths.

`re` needs 39 s for four `.*?\\.` on 200 dots, and unbounded time for alternatives that begin alike. Here each
part of a pattern maps a set of positions to the set that it can reach, forwards or backwards; backwards is how a
lookahead is evaluated for all positions at once. The language is that of `re` without what cannot be matched this way:
references, repeated groups, named groups and flags.
"""

import re
from collections.abc import Callable, Set
from functools import lru_cache

MAX_PATTERN_CHARS = 1000
MAX_REPEATS = 1000
MAX_DEPTH = 50

_Step = Callable[[str, Set[int], bool], Set[int]]
"""(text, positions, backwards) -> positions."""
_CHARACTER = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]|\\[dDsSwW]|\\[^A-Za-z0-9]|[^\\()\[|*+?{^$]")
_BOUNDARY = re.compile(r"[\^$]|\\[bBAZ]")
_OPEN = re.compile(r"\((?:\?(?::|<?[=!]))?")
_REPEAT = re.compile(r"(?:([*+?])|\{([0-9]{1,4})(,?)([0-9]{0,4})\})\??")


@lru_cache(maxsize=256)
def compiled(pattern: str) -> _Step:
    """Raises ValueError unless the text is a short regular expression that needs no backtracking."""
    if len(pattern) > MAX_PATTERN_CHARS:
        raise ValueError(f"it has more than {MAX_PATTERN_CHARS} characters")
    try:
        re.compile(pattern)
        parser = _Parser(pattern)
        step = parser.alternatives()
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError("it is not a regular expression") from error
    parser.end()
    return step


def matches_fully(pattern: str, text: str) -> bool:
    """Like `re.fullmatch`, for text of one line."""
    return len(text) in compiled(pattern)(text, {0}, False)


def matches_end(pattern: str, path: str) -> bool:
    """Like `re.match(rf"(.*\\.)?({pattern})$", path)`: matches a full dotted path, or its end after a dot."""
    starts = {0} | {at + 1 for at, character in enumerate(path) if character == "."}
    return len(path) in compiled(pattern)(path, starts, False)


class _Parser:
    """Parses a pattern that `re` accepts."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.at = 0
        self.depth = 0
        self.repeats = 0

    def end(self) -> None:
        if self.at < len(self.pattern):
            raise ValueError(f"{self.pattern[self.at : self.at + 20]!r} in it cannot be matched in bounded time")

    def _take(self, form: re.Pattern[str]) -> re.Match[str] | None:
        match = form.match(self.pattern, self.at)
        self.at = match.end() if match else self.at
        return match

    def alternatives(self) -> _Step:
        branches = [self._sequence()]
        while self.pattern.startswith("|", self.at):
            self.at += 1
            branches.append(self._sequence())
        return lambda text, starts, back: frozenset[int]().union(*(step(text, starts, back) for step in branches))

    def _sequence(self) -> _Step:
        steps: list[_Step] = []
        while step := self._part():
            steps.append(step)

        def follow(text: str, starts: Set[int], back: bool) -> Set[int]:
            for step in reversed(steps) if back else steps:
                starts = step(text, starts, back)
            return starts

        return follow

    def _part(self) -> _Step | None:
        if match := self._take(_BOUNDARY):
            boundary = re.compile(match.group())
            return lambda text, starts, back: {at for at in starts if boundary.match(text, at)}
        if match := self._take(_CHARACTER):
            return self._repeated(_character(re.compile(match.group())))
        opened = self._take(_OPEN)
        return self._group(opened.group()) if opened else None

    def _group(self, opening: str) -> _Step:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ValueError(f"its groups are nested more than {MAX_DEPTH} deep")
        inner = self.alternatives()
        self.depth -= 1
        if not self.pattern.startswith(")", self.at):
            self.end()
        self.at += 1
        if opening[-1] in "=!":
            return _around(inner, ahead="<" not in opening, wanted=opening[-1] == "=")
        match = self._take(_REPEAT)
        if match is None:
            return inner
        if match.group(1) != "?":
            self.at = match.start()
            self.end()
        return lambda text, starts, back: starts | inner(text, starts, back)

    def _repeated(self, step: _Step) -> _Step:
        match = self._take(_REPEAT)
        if match is None:
            return step
        sign, least, comma, most = match.groups()
        low = int(least) if least else int(sign == "+")
        high = 1 if sign == "?" else int(most) if most else low if least and not comma else None
        # For all of them together: each is one more pass over all positions, however few characters it needs.
        self.repeats += max(low, high or 0)
        if self.repeats > MAX_REPEATS:
            raise ValueError(f"its repeats add up to more than {MAX_REPEATS}")

        def repeat(text: str, starts: Set[int], back: bool) -> Set[int]:
            for _ in range(low):
                starts = step(text, starts, back)
            reached, fresh, rounds = set(starts), starts, low
            while fresh and (high is None or rounds < high):
                fresh = step(text, fresh, back) - reached
                reached |= fresh
                rounds += 1
            return reached

        return repeat


def _character(form: re.Pattern[str]) -> _Step:
    def step(text: str, starts: Set[int], back: bool) -> Set[int]:
        if back:
            return {at - 1 for at in starts if at > 0 and form.match(text, at - 1)}
        return {at + 1 for at in starts if form.match(text, at)}

    return step


def _around(inner: _Step, *, ahead: bool, wanted: bool) -> _Step:
    """A lookahead holds at positions where `inner` may begin: it is run backwards from every position; a lookbehind is
    run forwards."""

    def step(text: str, starts: Set[int], back: bool) -> Set[int]:
        holds = inner(text, frozenset(range(len(text) + 1)), ahead)
        return {at for at in starts if (at in holds) is wanted}

    return step
