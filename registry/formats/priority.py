"""Priorities of jobs: the names that requests have, and the ranks that rows have."""

from enum import StrEnum


class Priority(StrEnum):
    """A job's priority: of equally busy namespaces, jobs of higher priority go first."""

    LOW = "low"
    NORMAL = "normal"
    HIGH = "high"

    @property
    def rank(self) -> int:
        """The priority as a job's row has it."""
        return {"low": -1, "normal": 0, "high": 1}[self]

    @classmethod
    def of(cls, rank: int) -> "Priority":
        """The priority of a job's row."""
        return cls.NORMAL if rank == 0 else cls.HIGH if rank > 0 else cls.LOW
