"""Tables only."""

from registry.models.catalog import (
    Base,
    BaseAlias,
    BaseLocation,
    Blob,
    Release,
    Repository,
    Revision,
    RevisionFile,
    TargetSet,
    TargetSetMember,
)
from registry.models.quality import Channel, Gate, Move, Score, Suite
from registry.models.work import AuditRow, Composition, Job, ReleaseInput

__all__ = [
    "AuditRow",
    "Base",
    "BaseAlias",
    "BaseLocation",
    "Blob",
    "Channel",
    "Composition",
    "Gate",
    "Job",
    "Move",
    "Release",
    "ReleaseInput",
    "Repository",
    "Revision",
    "RevisionFile",
    "Score",
    "Suite",
    "TargetSet",
    "TargetSetMember",
]
