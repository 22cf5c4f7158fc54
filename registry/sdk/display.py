"""Displays of an operation's progress and warnings: the command line's bars and stderr, or Python's warnings."""

import warnings
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from composer.conflicts.evidence.probe import Progress


class Display(Protocol):
    """`registry.cli.console.render` is one."""

    def progress(self, label: str, total: int | None, unit: str = "bytes", /) -> AbstractContextManager["Progress"]:
        """Shows a bar in the context. The callback's amounts are in `unit`; it may be called from any thread."""
        ...

    def warn(self, message: str, /) -> None:
        """Shows a warning."""
        ...


class Quiet:
    """The display of a program: no progress, and Python's warnings."""

    @contextmanager
    def progress(self, _label: str, _total: int | None, _unit: str = "bytes", /) -> Generator["Progress"]:
        yield _Unseen()

    def warn(self, message: str, /) -> None:
        warnings.warn(message, stacklevel=2)


class _Unseen:
    def __call__(self, count: int) -> None:
        pass

    def expect(self, total: int) -> None:
        pass
