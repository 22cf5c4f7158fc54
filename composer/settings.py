"""What a method may be told: names, defaults and types. No torch, so that a recipe is judged before any work begins."""

from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from typing import cast

from composer.errors import NotSupported
from composer.text import shown


def real(value: object) -> float:
    """A finite number, also one spelled as text. Raises ValueError for everything else."""
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else float("nan")
    except OverflowError as error:
        raise ValueError("a finite number") from error
    if not isfinite(number):
        raise ValueError("a finite number")
    return number


def _truth(value: object) -> bool:
    truths = {"true": True, "false": False}
    word = str(value).lower() if isinstance(value, bool | str) else ""
    if word not in truths:
        raise ValueError("true or false")
    return truths[word]


def _tied(value: object) -> str:
    if value not in ("refuse", "shared", "untie"):
        raise ValueError("refuse, shared or untie")
    return str(value)


_Setting = tuple[object, Callable[[object], object]]  # default, parser
_EVERY_METHOD: dict[str, _Setting] = {"lambda": (1.0, real), "tied": ("refuse", _tied)}
SETTINGS: dict[str, dict[str, _Setting]] = {
    "stack": _EVERY_METHOD,
    "linear": {**_EVERY_METHOD, "normalize": (False, _truth)},
}


def parse_settings(method: str, settings: Mapping[str, object]) -> dict[str, object]:
    """Settings of a method, complete and typed. Values may be text, as a command line has them.

    Raises NotSupported for an unknown method, setting or value, naming the known ones.
    """
    if method not in SETTINGS:
        raise NotSupported(
            "unknown_method",
            f"There is no method {shown(method)}.",
            subject=method,
            next_step=f"Use one of {', '.join(SETTINGS)}.",
        )
    known = SETTINGS[method]
    parsed = {name: default for name, (default, _) in known.items()}
    for name, value in settings.items():
        if name not in known:
            message = f"{method} has no setting {shown(name)}."
            raise NotSupported(
                "unknown_setting", message, subject=name, next_step=f"It knows {', '.join(sorted(known))}."
            )
        try:
            parsed[name] = known[name][1](value)
        except ValueError as error:
            message = f"The setting {name} is {shown(value)}."
            raise NotSupported("bad_setting", message, subject=name, next_step="Give another value.") from error
    return parsed


def effective_weights(weights: Sequence[float], method: str, settings: Mapping[str, object]) -> list[float]:
    """What each adapter is multiplied by in the end, the method's own factors included."""
    parsed = parse_settings(method, settings)
    total = sum(weights) if parsed.get("normalize") else 1.0
    factor = cast(float, parsed["lambda"])
    return [factor * weight / total if total else 0.0 for weight in weights]
