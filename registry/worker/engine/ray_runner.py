"""What runs on a node of a Ray cluster: a process that takes one unit after the other.

A class of its own module, without Ray: nodes import it by name.
"""

import logging
import socket
import traceback
from importlib.metadata import version
from typing import Any

from pydantic import ValidationError
from pydantic_settings import SettingsError

from composer.errors import ComposerError
from registry.errors import RegistryError, Unavailable
from registry.errors.translation import of_failed_work
from registry.settings import Settings
from registry.worker.engine.units import Node, Task, Unit, last_log_lines, open_node, run_unit

log = logging.getLogger(__name__)


class UnitRunner:
    """Runs units with the settings of its node. It stays while a step has units, so what a unit loaded, such as a base,
    is there for the next."""

    _node: Node

    def ready(self, marker: str, expected: str) -> dict[str, str]:
        """Whether this node can run units: `problem` says why not, and is empty if it can."""
        own = version("adaptory")
        if own != expected:
            return {"problem": f"it has adaptory {own}, and the worker has {expected}."}
        try:  # here, since Ray does not say why a constructor failed
            self._node = open_node(Settings())
        except ValidationError as error:
            return {"problem": f"a setting of it is wrong: {_first_setting(error)}."}
        except (RegistryError, SettingsError, OSError) as error:
            return {"problem": f"{socket.gethostname()}: {error}"}
        if self._node.results.read(marker) is None:
            return {"problem": "its store is another: it does not have what the worker has just written."}
        return {"problem": ""}

    def run(self, task: Task, unit: Unit) -> dict[str, Any]:
        """The unit's `result`, or its `error` as a row and the last lines of this process's `log`."""
        with last_log_lines() as lines:
            try:
                log.info("%s begins", unit.name)
                return {"result": run_unit(self._node, task, unit)}
            except (RegistryError, ComposerError, OSError) as error:
                log.warning("%s failed", unit.name, exc_info=error)
                failure = of_failed_work(error)
            except Exception as error:
                log.exception("%s failed", unit.name)
                failure = _defect(error)
            return {"error": failure.to_row(), "log": list(lines)}


def _first_setting(error: ValidationError) -> str:
    """The name of the first wrong setting and what is wrong, without its value."""
    first = error.errors()[0]
    return f"ADAPTORY_{'__'.join(map(str, first['loc']))}".upper() + f": {first['msg']}"


def _defect(error: Exception) -> Unavailable:
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{last.filename.rpartition('/')[2]}:{last.lineno}"
    return Unavailable("unit_failed", f"{type(error).__name__} in {where}: {error}")
