"""The Python API: registries, releases and a callback for trainers (docs/reference/python.md).

Names are imported on first use: the command line, which is built on this package, starts faster, and the callback
needs transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from registry.environment.composer_name import refuse_other_composer

if TYPE_CHECKING:
    from registry.sdk.registry import Registry
    from registry.sdk.results import Composition, Move, Promotion, Release, Rollout, Score
    from registry.sdk.training import AdaptoryCallback

__all__ = ["AdaptoryCallback", "Composition", "Move", "Promotion", "Registry", "Release", "Rollout", "Score"]
_MODULES = {"AdaptoryCallback": "training", "Registry": "registry"}


refuse_other_composer()


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'results')}"), name)
