"""Options that a command would otherwise ignore silently."""

from collections.abc import Mapping

from registry.errors import Usage


def refuse_idle(options: Mapping[str, object], why: str, next_step: str) -> None:
    """Raises Usage for the first of these options that was given. `why` completes "NAME has no effect"."""
    for name, value in options.items():
        if value:
            raise Usage("idle_option", f"{name} has no effect {why}.", subject=name, next_step=next_step)
