"""The process on a node of a Ray cluster that runs units one by one.

It has a module of its own, without Ray, because nodes import it by name.
"""

import socket
from importlib.metadata import version
from typing import Any

from pydantic import ValidationError
from pydantic_settings import SettingsError

from registry.environment.settings import Settings
from registry.errors import RegistryError
from registry.worker.engine.answers import UnitAnswer, answer_of
from registry.worker.engine.units import HostNode, Task, Unit, open_node, run_unit


class UnitRunner:
    """Runs units with the settings of its node. It lives while a step has units, so that the next unit can reuse what
    one has loaded, such as a base."""

    _node: HostNode

    def ready(self, marker: str, expected: str) -> str:
        """Checks whether this node can run units. Returns the reason why it cannot, or nothing."""
        own = version("adaptory")
        if own != expected:
            return f"it has adaptory {own}, and the worker has {expected}."
        try:  # here, since Ray hides why a constructor failed
            self._node = open_node(Settings())
        except ValidationError as error:
            first = error.errors()[0]  # without the value, which may be secret
            name = f"ADAPTORY_{'__'.join(map(str, first['loc']))}".upper()
            return f"one of its settings is wrong: {name}: {first['msg']}."
        except (RegistryError, SettingsError, OSError) as error:
            return f"{socket.gethostname()}: {error}"
        if self._node.results.read(marker) is None:
            return "its store is another: it does not have what the worker has just written."
        return ""

    def run(self, task: Task[Any], unit: Unit) -> UnitAnswer:
        """Runs the unit and returns its answer."""
        return answer_of(unit.name, lambda: run_unit(self._node, task, unit))
