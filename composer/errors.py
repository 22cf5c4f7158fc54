"""Errors: what cannot be read, combined or merged. Each names the file or module and the next step.

ComposerError
├── InvalidFile      a file is damaged, missing or not what it claims to be
├── Mismatch         an adapter does not fit the base
├── NotSupported     a known format or variant that is refused by name
└── RefusedOutput    the output cannot be written here
"""

from composer.next_steps import NEXT_STEPS


class ComposerError(Exception):
    """`code` is stable and for machines, `subject` names the file or module, `next_step` is by default the text of the
    code."""

    def __init__(self, code: str, message: str, *, subject: str = "", next_step: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.subject = subject
        self.next_step = NEXT_STEPS.get(code, "") if next_step is None else next_step

    def __str__(self) -> str:
        return f"{self.message} {self.next_step}".strip()


class InvalidFile(ComposerError):
    """A file is damaged, missing or not what it claims to be."""


class Mismatch(ComposerError):
    """An adapter does not fit the base, or adapters do not fit each other."""


class NotSupported(ComposerError):
    """A known format or variant that this version refuses rather than handle wrongly."""


class RefusedOutput(ComposerError):
    """The output directory exists, or the disk has no space for the result."""


class Interrupted(Exception):
    """Raised by a caller's `progress` to stop work that can be resumed, as after a Ctrl-C: finished parts are kept."""


def became_shorter(subject: str) -> InvalidFile:
    """The error for a file that is shorter than its own header states."""
    message = f"{subject} became shorter while it was read."
    return InvalidFile("cut_off", message, subject=subject)
