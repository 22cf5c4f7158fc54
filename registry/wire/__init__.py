"""The wire: the form of requests and responses. Field names are the contract of REST and of `--json`.

Modules are imported on first use, as `wire.catalog.ReleaseOut`: the command line names many types but needs few of
them, and `--help` needs none.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from registry.wire import access as access
    from registry.wire import catalog as catalog
    from registry.wire import changes as changes
    from registry.wire import fleet as fleet
    from registry.wire import quality as quality
    from registry.wire import search as search
    from registry.wire import webhooks as webhooks
    from registry.wire import work as work

_MODULES = ("access", "catalog", "changes", "fleet", "quality", "search", "webhooks", "work")


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.{name}")
