"""The requests of the client; it adds fields that are not used here."""

from pydantic import BaseModel, Field

from registry.formats.manifest import MAX_FILES


class RepositoryIn(BaseModel):
    name: str
    organization: str | None = None
    type: str | None = None
    private: bool | None = None
    visibility: str | None = None


class MoveIn(BaseModel):
    fromRepo: str  # noqa: N815


class PlannedFile(BaseModel):
    path: str
    size: int = Field(ge=0)


class PlanIn(BaseModel):
    files: list[PlannedFile] = Field(default=[], max_length=MAX_FILES)


class LfsObject(BaseModel):
    oid: str
    size: int = Field(ge=0)


class BatchIn(BaseModel):
    objects: list[LfsObject] = Field(default=[], max_length=MAX_FILES)
    transfers: list[str] = ["basic"]


class TagIn(BaseModel):
    tag: str
    message: str | None = None


class BranchIn(BaseModel):
    startingPoint: str | None = None  # noqa: N815
