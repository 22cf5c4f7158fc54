"""Query strings of search and of the audit log."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, Self, cast

from pydantic import ConfigDict, Field, model_validator

from composer.formats.adapters.serving import parse_profile
from registry.domain.access.audit import Act, Actor, EventQuery
from registry.domain.access.roles import Role, granted
from registry.domain.catalog.repositories import Kind
from registry.domain.catalog.suites import parse_condition
from registry.domain.search.query import REFUSED, RELATED, Query
from registry.errors import Usage
from registry.formats.references import parse_name, parse_repository
from registry.wire.document import MAX_INT32, MAX_INT64, Moment, Wire, WireIn

Rank = Annotated[int | None, Field(ge=1, le=MAX_INT32)]
Word = Annotated[str | None, Field(max_length=200)]
Names = Annotated[list[Annotated[str, Field(min_length=1, max_length=200)]], Field(max_length=200)]

LISTS = ("include", "facets", "targets_within", "targets_include", "targets_exact")
"""Parameters with lists of names, which contain no commas."""
UNSPLIT = ("score", "provenance")
"""Lists whose items may contain commas."""
INCLUDED = {RELATED: "base", REFUSED: "loads_in"}
"""The values of `include`, and the condition that each one needs."""
PARSERS: dict[str, Callable[[Any], Any]] = {
    "kind": Kind,
    "repository": parse_repository,
    "score": lambda texts: [parse_condition(text) for text in texts],
    "channel": lambda text: parse_name(text, "channel"),
    "loads_in": parse_profile,
}
"""Fields of a query that are not as on the wire."""


class SearchIn(Wire):
    """Query parameters; all conditions must hold. Give a list by repeating its parameter or with commas. Only `text`
    may be empty."""

    kind: Literal["adapter", "model", "set"] = "adapter"
    namespace: Word = None
    repository: Word = Field(default=None, description="namespace/name")
    base: Word = Field(default=None, description="Digest (or its first 12 or more digits), name or alias.")
    include: list[Literal["related", "refused"]] = Field(
        default=[],
        max_length=2,
        description="related: also releases for casts and quantizations of the base, marked as such. "
        "refused: also those that `loads_in` cannot load, with the reasons.",
    )
    type: Word = None
    variant: Word = None
    dtype: Word = None
    license: Word = Field(
        default=None,
        description="Licence of the release. An SPDX name also matches the spellings that cards use for it.",
    )
    base_license: Word = Field(
        default=None, description="Licence of the release's base, as an SPDX name if it has one."
    )
    alpha: float | None = Field(default=None, allow_inf_nan=False)
    min_rank: Rank = None
    max_rank: Rank = Field(default=None, description="The highest rank of any module.")
    targets_within: Names = Field(default=[], description="Only these module names may be adapted.")
    targets_include: Names = Field(default=[], max_length=20, description="All of these module names are adapted.")
    targets_exact: Names = Field(default=[], description="These module names are adapted, and no others.")
    max_size_bytes: int | None = Field(
        default=None, ge=0, le=MAX_INT64, description="Maximum size of all files together."
    )
    score: list[str] = Field(default=[], max_length=20, description="suite.metric>=number or suite.metric<=number")
    channel: Word = Field(default=None, description="Currently served by the channel of this name.")
    text: str = Field(
        default="", max_length=200, description="Prefixes of words in the name or the notes; all must match."
    )
    provenance: list[Annotated[str, Field(max_length=3_000)]] = Field(
        default=[],
        max_length=20,
        description="NAME:VALUE that the release states, ignoring case: trainer:axolotl, data:sha256:ab12, "
        "hyperparameters.learning_rate:0.003",
    )
    loads_in: Word = Field(default=None, description="vllm:<max_lora_rank>, sglang, lorax, llamacpp or peft")
    include_yanked: bool = False
    stable: bool = Field(default=False, description="No pre-releases.")
    latest: bool = Field(default=False, description="The highest stable release of each repository that is not yanked.")
    sort: str = Field(
        default="newest",
        max_length=150,
        description="newest, version (highest first), size or rank (lowest first), or suite.metric (best first, only "
        "releases that have it). "
        "A metric that no release you may read has is unknown.",
    )
    facets: list[Literal["base", "channel", "kind", "license", "loads_in", "measured", "namespace"]] = Field(
        default=[],
        max_length=7,
        description="Counts the results for each choice of these conditions, up to 1,000; measured: suite.metric.",
    )
    limit: int = Field(default=50, ge=1, le=500, description="Items per page.")
    cursor: str | None = Field(default=None, max_length=1000, description="`next` of the previous page.")

    @model_validator(mode="before")
    @classmethod
    def _read(cls, given: Any) -> Any:
        """Collects repeated parameters."""
        parameters: dict[str, Any] = {}
        for name, values in cast(Mapping[str, list[str]], given).items():
            parameters[name] = _value(name, values)
        return parameters

    @model_validator(mode="after")
    def _refuse_idle(self) -> Self:
        """Refuses an `include` that would be ignored silently."""
        for added, condition in INCLUDED.items():
            if added in self.include and not getattr(self, condition):
                raise Usage(
                    "idle_include",
                    f"include={added} has no effect without {condition}.",
                    subject=added,
                    next_step=f"Add {condition} (--{condition.replace('_', '-')}), or leave {added} out.",
                )
        return self

    def parse(self) -> Query:
        """Raises Usage or NotSupported for a text that no field of a query can have."""
        given = {name: getattr(self, name) for name in self.model_fields_set if name in Query.__dataclass_fields__}
        return Query(**given | {name: parse(given[name]) for name, parse in PARSERS.items() if name in given})


def _value(name: str, given: list[str]) -> str | list[str]:
    parts = [part.strip() for text in given for part in text.split(",") if part.strip()]
    if not parts and name != "text":  # text may be empty
        flag = f"--{name.replace('_', '-')}"
        raise Usage(
            "empty_parameter",
            f"{name} is empty.",
            subject=name,
            next_step=f"Give {name} ({flag}) a value, or leave it out.",
        )
    if name in LISTS:
        return parts
    if name not in UNSPLIT and len(given) > 1:
        raise Usage("repeated_parameter", f"{name} is given {len(given)} times.", subject=name)
    return given if name in UNSPLIT else given[0]


class EventFilters(WireIn):
    """Conditions on rows of the audit log; all must hold."""

    model_config = ConfigDict(extra="ignore")  # it is given the cursor too; routes refuse unknown parameters

    namespace: str | None = Field(default=None, max_length=64)
    subject: str | None = Field(default=None, max_length=300, description="acme/sql@prod, or a prefix: acme/*")
    by: str | None = Field(default=None, max_length=128, description="The user who acted.")
    act: Act | None = None
    since: Moment | None = None
    until: Moment | None = None

    def query(self, actor: Actor) -> EventQuery:
        """A registry admin reads all rows, an admin of namespaces those of their namespaces."""
        return EventQuery(
            visible=granted(actor, Role.ADMIN).within,
            namespace=self.namespace,
            subject=self.subject,
            actor=self.by,
            act=self.act,
            since=self.since,
            until=self.until,
        )
