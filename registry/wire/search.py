"""Documents of search and resolve."""

from registry.wire.catalog import BaseRef, DeprecationOut, FileRow, NamedRelease, ReleaseOut
from registry.wire.document import Page, Wire


class RelatedOut(Wire):
    """The base searched for, and its relation to the release's own base."""

    base: BaseRef
    relation: str


class LoadingOut(Wire):
    profile: str
    loads: bool
    reasons: list[str]
    way_out: list[str]


class FoundOut(ReleaseOut):
    """`related` is set if the release was made for a different base than the one searched for."""

    related: RelatedOut | None
    loads_in: LoadingOut | None


class ChoiceOut(Wire):
    """A value of a facet, and the number of releases that the search would return with it; `more` if that number is the
    limit."""

    value: str
    count: int
    more: bool


class FoundPage(Page[FoundOut]):
    """`facets` has the choices of each requested facet, the most frequent first."""

    facets: dict[str, list[ChoiceOut]] | None = None


class ResolvedRelease(NamedRelease):
    """The data needed to fetch a release; its facts and scores are in the release itself. `size_bytes` is the total
    size of its files."""

    yanked: bool
    yank_reason: str | None
    deprecated: DeprecationOut | None
    base_deprecated: DeprecationOut | None
    size_bytes: int
    files: list[FileRow]


AnyRelease = ResolvedRelease | ReleaseOut


class ResolvedOut(Wire):
    """`warning` is set if the reference resolved to something unexpected, to a yanked or deprecated release, or to one
    on a deprecated base."""

    release: ResolvedRelease
    warning: str
