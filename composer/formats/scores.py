"""A score as JSON, as `composer.evaluation` measures it and a registry records it."""

from typing import TypedDict


class ScoreDocument(TypedDict):
    """One metric of one suite, and the suite's task. `stderr` is over the `n` examples; null if there is only one."""

    suite: str
    suite_digest: str
    task: str
    metric: str
    value: float
    stderr: float | None
    n: int
    higher_is_better: bool
