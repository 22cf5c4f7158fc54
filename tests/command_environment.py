"""The environment and the words of a command that runs in this process."""

import os
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager


@contextmanager
def environment(values: Mapping[str, str], argv: list[str]) -> Generator[None]:
    """With these variables of Adaptory and no others."""
    kept, kept_argv = dict(os.environ), sys.argv
    for name in [name for name in os.environ if name.startswith("ADAPTORY_")]:
        del os.environ[name]
    os.environ.update(values)
    sys.argv = argv
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)
        sys.argv = kept_argv
