"""Durations as people write them: 90s, 5m, 1h30m."""

import re

from registry.errors import Usage

_UNITS = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}
_DURATION = re.compile("".join(rf"(?:(\d{{1,6}}){unit})?" for unit in _UNITS))


def parse_duration(text: str) -> int:
    """The seconds of a duration such as `90s`, `5m` or `1h30m`. Raises Usage for anything else."""
    match = _DURATION.fullmatch(text.strip())
    if match is None or not any(match.groups()):
        raise Usage("bad_duration", f"{text[:80]!r} is not a duration.", subject=text[:80])
    return sum(int(number or 0) * unit_s for number, unit_s in zip(match.groups(), _UNITS.values(), strict=True))
