"""Python scorers of suites: workers run those that the operator has enabled."""

from collections.abc import Collection

from composer.formats.recipes.suite import Suite as SuiteContent
from composer.formats.recipes.tasks import ANSWER_SCORERS
from registry.database.tables import Suite
from registry.errors import Refused


def refuse_disabled(suite: Suite, enabled: Collection[str]) -> None:
    """Raises Refused for a suite whose answers a Python scorer scores that is not enabled."""
    if name := disabled(suite, enabled):
        raise Refused(
            "scorer_disabled",
            f"The scorer {name} of {suite.name} is Python code, which this server has not enabled.",
            subject=name,
            next_step=f"If you trust it, set ADAPTORY_SCORERS={','.join([*enabled, name])} for the server and its "
            "workers, and install it where workers run.",
        )


def disabled(suite: Suite, enabled: Collection[str]) -> str | None:
    """The Python scorer of the suite's answers, if it has one that is not enabled."""
    if suite.task != "generation":
        return None
    chosen = SuiteContent.from_json(suite.content).scoring
    name = chosen.name if chosen else "match"
    return None if name in ANSWER_SCORERS or name in enabled else name
