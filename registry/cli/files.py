"""Files that a command is told to read."""

from pathlib import Path

from registry.errors import Invalid


def read_text(path: Path) -> str:
    """Raises Invalid for a file that is not there, that may not be read, or that is no UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        why = str(error.strerror)
    except UnicodeDecodeError as error:
        why = f"it is not UTF-8 from byte {error.start} on"
    raise Invalid(
        "unreadable", f"{path} cannot be read: {why}.", subject=str(path), next_step="Name a text file that is there."
    )
