"""Tables only."""

from registry.database.tables.access import KeptAnswer, Member, Namespace, Token
from registry.database.tables.catalog import (
    Base,
    BaseAlias,
    BaseLocation,
    Blob,
    BlobHolder,
    Release,
    ReleaseWord,
    Repository,
    Revision,
    RevisionFile,
    Signature,
    TargetSet,
    TargetSetMember,
    Traits,
    Upload,
)
from registry.database.tables.quality import Channel, Gate, Move, Score, Suite, SuiteMetric
from registry.database.tables.work import AuditRow, Composition, Job, ReleaseInput

__all__ = [
    "AuditRow",
    "Base",
    "BaseAlias",
    "BaseLocation",
    "Blob",
    "BlobHolder",
    "Channel",
    "Composition",
    "Gate",
    "Job",
    "KeptAnswer",
    "Member",
    "Move",
    "Namespace",
    "Release",
    "ReleaseInput",
    "ReleaseWord",
    "Repository",
    "Revision",
    "RevisionFile",
    "Score",
    "Signature",
    "Suite",
    "SuiteMetric",
    "TargetSet",
    "TargetSetMember",
    "Token",
    "Traits",
    "Upload",
]
