"""Documents of bases, repositories and releases."""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import FailFast, Field

from composer.formats.untrusted import MAX_HYPERPARAMETERS, MAX_ITEMS, MAX_TEXT
from registry.wire.document import MAX_INT64, Wire, WireIn
from registry.wire.quality import ScoreOut

Sha256 = Field(pattern=r"^[0-9a-f]{64}$")
Count = Annotated[int, Field(ge=0, le=MAX_INT64)]


class DeprecationOut(Wire):
    """The reason to choose something else, and the successor. A deprecation blocks nothing."""

    reason: str
    successor: str | None


class BaseTensor(Wire):
    name: str = Field(min_length=1, max_length=1000, pattern=r"^[^\x00-\x1f\x7f]+$")
    dtype: str = Field(pattern="^[A-Z0-9_]{1,16}$")
    shape: list[Count] = Field(max_length=16)
    sha256: str = Sha256


class BaseIn(WireIn):
    name: str
    model_type: str = Field(max_length=64)
    tied: bool
    weights_digest: str = Sha256
    tensors: Annotated[list[BaseTensor], FailFast()] = Field(min_length=1, max_length=1_000_000)
    aliases: list[str] = Field(default=[], max_length=100)
    locations: list[str] = Field(default=[], max_length=100)
    derived_from: str | None = Field(
        default=None, max_length=200, description="Digest, name or alias of a registered base."
    )
    relation: Literal["cast", "quantized", "finetuned", "merged"] | None = None
    license: str | None = Field(default=None, min_length=1, max_length=100)


class BaseRef(Wire):
    digest: str
    name: str


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
    tensors: list[BaseTensor] | None = None
    derived_from: BaseRef | None
    relation: str | None
    license: str | None
    deprecated: DeprecationOut | None


class FileRow(Wire):
    path: str = Field(max_length=400)
    size_bytes: Count
    sha256: str = Sha256


class DataRow(Wire):
    """Data that an adapter was trained on."""

    name: str = Field(max_length=MAX_TEXT)
    digest: str | None = Field(default=None, max_length=MAX_TEXT)
    license: str | None = Field(default=None, max_length=MAX_TEXT)


Text = Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]
Setting = bool | int | float | str | None


class Provenance(Wire):
    """A release's provenance, as stated by its model card or its publisher."""

    trainer: Text | None = None
    run_url: Text | None = None
    code_commit: Text | None = None
    base_license: Text | None = None
    base_model: Text | None = None
    license: str | None = Field(default=None, min_length=1, max_length=100)
    license_link: Text | None = None
    library_name: Text | None = None
    imported_from: Text | None = None
    imported_endpoint: Text | None = None
    data: list[DataRow] = Field(default=[], max_length=MAX_ITEMS)
    hyperparameters: dict[Text, Setting | Annotated[list[Setting], Field(max_length=MAX_ITEMS)]] = Field(
        default={}, max_length=MAX_HYPERPARAMETERS
    )
    tags: list[Text] = Field(default=[], max_length=MAX_ITEMS)
    phrases: dict[Text, Text] = Field(
        default={}, max_length=MAX_ITEMS, description="The words before a prompt that select a task, by its suite."
    )


class ReleaseIn(WireIn):
    """`allow_breaking` states why a breaking change may have a version number that promises compatibility.
    `strict`: warnings are errors, and nothing is published."""

    version: str | None = None
    bump: Literal["auto", "major", "minor", "patch"] | None = None
    base: str = Field(min_length=1, max_length=200)
    files: list[FileRow] = Field(min_length=1, max_length=2_000)
    notes: str = Field(default="", max_length=20_000)
    allow_breaking: str | None = Field(default=None, min_length=1, max_length=1000)
    provenance: Provenance | None = None
    strict: bool = False


class SpectrumSummary(Wire):
    """`norm` is |Delta|_F over all modules; `rank_95` the rank to which all modules could be truncated while keeping 95
    % of its square; `energy` the share kept at ranks 1, 2, 4, …; `effective_rank` exp(entropy of the singular values),
    averaged by energy; `near_zero` the number of such modules."""

    norm: float
    effective_rank: float
    energy: dict[str, float] = Field(default_factory=dict[str, float])
    rank_95: int
    rank_99: int
    near_zero: int


class ModuleSpectrumOut(Wire):
    module: str
    rank: int
    norm: float
    effective_rank: float
    energy: dict[str, float] = Field(default_factory=dict[str, float])
    rank_95: int
    rank_99: int
    near_zero: bool


class SpectrumOut(SpectrumSummary):
    """`left_out` are modules whose singular values were not computed."""

    modules: list[ModuleSpectrumOut]
    left_out: list[str]


class Refusal(Wire):
    """The reasons why a server cannot load an adapter, and ways to make it load."""

    reasons: list[str]
    way_out: list[str]


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
    spectrum: SpectrumSummary | None = None


class ModelFactsOut(Wire):
    type: str
    variant: str
    parameters: int
    size_bytes: int
    dtype: str


class SetFactsOut(Wire):
    """`members` are the classes of the router but the base. `rank_max` and `targets` are what a server needs for all of
    them; `parameters` and `size_bytes` are their sums."""

    type: str
    variant: str
    members: list[str]
    rank_max: int
    targets: list[str]
    parameters: int
    size_bytes: int
    dtype: str


class InputOut(Wire):
    """`repository`, `version` and `yank_reason` are null if the caller may not read them. A yanked input stays part of
    this release; one that was taken down has lost its files."""

    repository: str | None
    version: str | None
    commit: str
    weight: float
    yanked: bool = False
    yank_reason: str | None = None
    taken_down: bool = False


class DescendantOut(Wire):
    """A release that contains this one, with its weight there."""

    repository: str
    kind: str
    version: str
    commit: str
    weight: float


class LicensesOut(Wire):
    """Licences: SPDX names where they exist, otherwise as stated; null or empty if nothing is stated. `adapter` is the
    licence of the release itself, also for a model."""

    base: str | None
    adapter: str | None
    data: list[str]


class TakenDownOut(Wire):
    """The tombstone of a release whose files are permanently gone."""

    at: datetime
    reason: str


class NamedRelease(Wire):
    """The names of a release."""

    repository: str
    kind: str
    version: str
    commit: str
    base: BaseRef

    @property
    def name(self) -> str:
        """`acme/sql:1.0.0`"""
        return f"{self.repository}:{self.version}"

    @property
    def line(self) -> str:
        """The path of its repository in the API."""
        return f"/v1/{self.kind}s/{self.repository}"

    @property
    def path(self) -> str:
        """The path of the resource in the API."""
        return f"{self.line}/releases/{self.version}"


class ReleaseOut(NamedRelease):
    """`servers` can load it if its rank is within their limit; `loading` has the reasons that others cannot.

    `signed_by` is the SHA-256 of the signing key's PEM; `signature_covers` states whether the signature binds the
    release (repository, version, base, commit) or only its files, and `signed_as` who signed, a publisher or a worker
    (null if nobody did, or a server of an earlier version during an upgrade). `breaking_reason` is why it may break its
    range.
    """

    adapter: AdapterFactsOut | None
    model: ModelFactsOut | None
    set: SetFactsOut | None = None
    scores: list[ScoreOut]
    yanked: bool
    yank_reason: str | None
    taken_down: TakenDownOut | None
    deprecated: DeprecationOut | None
    base_deprecated: DeprecationOut | None
    notes: str
    created_at: datetime
    created_by: str
    files: list[FileRow]
    inputs: list[InputOut]
    provenance: Provenance
    licenses: LicensesOut
    servers: list[str]
    loading: dict[str, Refusal]
    signed_by: str | None
    signature_covers: Literal["release", "files"] | None
    signed_as: Literal["publisher", "worker"] | None
    breaking_reason: str | None

    @property
    def own_facts(self) -> AdapterFactsOut | ModelFactsOut | SetFactsOut | None:
        """The facts of its kind: adapter, model or set."""
        return self.adapter or self.model or self.set


class NextOut(Wire):
    """The version that a push with this bump would publish now."""

    version: str


class SignatureIn(WireIn):
    """`bundle` is a Sigstore bundle, as made by `adaptory sign`."""

    bundle: str = Field(max_length=16_000_000)


class SignatureOut(Wire):
    signed_by: str
    signed_as: Literal["publisher", "worker"] | None
    bundle: str
    created_at: datetime
    created_by: str


class SignaturesOut(Wire):
    """Signatures added after publication; one published with the release is its file `model.sig`."""

    signatures: list[SignatureOut]


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


class TargetSuiteOut(Wire):
    """Null if no target suite has been measured on the release."""

    target_suite: str | None


class DeprecateIn(WireIn):
    """A null reason undoes a deprecation. `successor` is a release or a repository; of a base, another base."""

    reason: str | None = Field(min_length=1, max_length=1000)
    successor: str | None = Field(default=None, min_length=1, max_length=200)


class LoadedOnOut(Wire):
    """A node that has a release loaded, or had in its last report if it is `silent`."""

    group: str
    node: str
    silent: bool


class ServingSetOut(Wire):
    """A set that has the release as a member, and the channels that serve it or try it as a canary."""

    release: str
    channels: list[str]


class TakedownOut(Wire):
    """`releases` have lost their files. `blobs` of `size_bytes` are removed, since nothing names them any more.
    `named_by` are releases and commits of the namespace that still have some of the files, and `kept_files` are these
    files, by path. `barred` are the weights that the namespace may not publish again. The nodes in `loaded_on` serve
    the files until they switch. `sets` lose a member: no server can load them any more."""

    releases: list[str]
    blobs: int
    size_bytes: int
    named_by: list[str]
    kept_files: dict[str, list[str]]
    barred: list[str]
    loaded_on: list[LoadedOnOut] = Field(default=[])
    sets: list[ServingSetOut] = Field(default=[])


class YankIn(WireIn):
    """The reason for a yank, an unyank or a takedown."""

    reason: str = Field(min_length=1, max_length=1000)


class WithdrawIn(YankIn):
    dry_run: bool = Field(default=False, description="Change nothing; the answer says what would.")


class ServedChangeOut(Wire):
    """A channel that now serves `after` instead of `before`. Null is nothing."""

    channel: str
    before: str | None
    after: str | None


class WithdrawnOut(ReleaseOut):
    """The release after a yank or an unyank, the channels that serve a different release because of it, the nodes
    that have the release loaded, and the `sets` that have it as a member, which go on serving it."""

    channels: list[ServedChangeOut] = Field(default=[])
    loaded_on: list[LoadedOnOut] = Field(default=[])
    sets: list[ServingSetOut] = Field(default=[])
