"""Tables only."""

from registry.models.access import KeptAnswer, Member, Namespace, Token
from registry.models.catalog import (
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
from registry.models.quality import Channel, Gate, Move, Score, Suite, SuiteMetric
from registry.models.work import AuditRow, Composition, Job, ReleaseInput

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
