"""Bases, releases, uploads and resolution on the wire."""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from registry.schemas import MAX_INT32, MAX_INT64, Wire
from registry.schemas.quality import ScoreOut

Sha256 = Field(pattern=r"^[0-9a-f]{64}$")
Count = Annotated[int, Field(ge=0, le=MAX_INT64)]


class TensorRow(Wire):
    name: str = Field(min_length=1, max_length=1000, pattern=r"^[^\x00-\x1f\x7f]+$")
    dtype: str = Field(pattern="^[A-Z0-9_]{1,16}$")
    shape: list[Count] = Field(max_length=16)
    sha256: str = Sha256


class BaseIn(Wire):
    name: str
    model_type: str = Field(max_length=64)
    tied: bool
    parameters: Count
    size_bytes: Count
    weights_digest: str = Sha256
    tensors: list[TensorRow] = Field(min_length=1, max_length=1_000_000)
    aliases: list[str] = Field(default=[], max_length=100)
    locations: list[str] = Field(default=[], max_length=100)


class BaseOut(Wire):
    digest: str
    architecture_digest: str
    name: str
    aliases: list[str]
    locations: list[str]
    model_type: str
    tied: bool
    parameters: int
    size_bytes: int
    tensor_count: int
    created_at: datetime
    created_by: str
    scores: list[ScoreOut]
    tensors: list[TensorRow] | None = None


class BaseRef(Wire):
    digest: str
    name: str


class FileRow(Wire):
    path: str = Field(max_length=400)
    size_bytes: Count
    sha256: str = Sha256


class ReleaseIn(Wire):
    version: str | None = None
    bump: Literal["major", "minor", "patch"] | None = None
    base: str = Field(min_length=1, max_length=200)
    files: list[FileRow] = Field(min_length=1, max_length=10_000)
    notes: str = Field(default="", max_length=20_000)


class AdapterFactsOut(Wire):
    """`ranks` and `alphas` name the modules that differ from `rank_max` and `alpha`."""

    type: str
    variant: str
    rank_max: int
    alpha: float
    targets: list[str]
    modules: int
    parameters: int
    size_bytes: int
    dtype: str
    modules_to_save: list[str]
    use_rslora: bool
    ranks: dict[str, int]
    alphas: dict[str, float]
    base_model_name_or_path: str | None
    peft_version: str | None


class ModelFactsOut(Wire):
    type: str
    variant: str
    parameters: int
    size_bytes: int
    dtype: str


class InputOut(Wire):
    repository: str
    version: str
    commit: str
    weight: float


class ReleaseOut(Wire):
    repository: str
    kind: str
    version: str
    commit: str
    base: BaseRef
    adapter: AdapterFactsOut | None
    model: ModelFactsOut | None
    scores: list[ScoreOut]
    yanked: bool
    yank_reason: str | None
    notes: str
    created_at: datetime
    created_by: str
    files: list[FileRow]
    inputs: list[InputOut]


class PublishedOut(Wire):
    release: ReleaseOut
    created: bool
    warnings: list[dict[str, Any]]


class RepositoryOut(Wire):
    repository: str
    kind: str
    latest: str | None
    channels: dict[str, str]
    created_at: datetime


class SearchIn(BaseModel):
    """Query parameters; a list is given by repeating its parameter. `limit` and `cursor` stand beside it."""

    kind: Literal["adapter", "model"] = "adapter"
    namespace: str | None = None
    base: str | None = Field(default=None, description="Digest, name or alias.")
    type: str | None = None
    max_rank: int | None = Field(default=None, ge=1, le=MAX_INT32)
    targets_within: list[str] = Field(default=[], max_length=200, description="Only these module names may be adapted.")
    targets_include: list[str] = Field(default=[], max_length=20, description="All of these module names are adapted.")
    score: list[str] = Field(default=[], max_length=20, description="suite.metric>=number or suite.metric<=number")
    include_yanked: bool = False


class ResolvedOut(Wire):
    """`target_suite` is the target suite that the release gained most on, which stands for it in a probe."""

    release: ReleaseOut
    warning: str
    target_suite: str | None


class YankIn(Wire):
    reason: str = Field(min_length=1, max_length=1000)


class UnyankIn(Wire):
    reason: str = Field(default="", max_length=1000)
