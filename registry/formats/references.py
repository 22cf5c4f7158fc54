"""Namespaces, repositories, versions, ranges and references: one parser, used everywhere.

acme/sql            the highest stable release that is not yanked
acme/sql:1.2.0      that version              acme/sql:^1.2    the highest in an npm range
acme/sql@prod       what the channel serves   acme/sql#1a2b3c4 the commit, seven digits or more
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import total_ordering
from operator import eq, ge, gt, le, lt
from typing import NewType

from registry.errors import Usage

_PART = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")
_NODE = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,98}[a-z0-9])?")
_COMMIT = re.compile(r"[0-9a-f]{7,40}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
RESERVED_NAMESPACES = frozenset(
    (
        *("account", "api", "assets", "audit", "bases", "buckets", "compose", "compositions", "conflicts", "datasets"),
        *("docs", "healthz", "inbox", "jobs", "login", "logout", "metrics", "models", "oauth", "openapi.json"),
        *("readyz", "robots.txt", "search", "spaces", "static", "suites", "v1", "v2", "xet"),
    )
)
"""Names that begin addresses of a server, or that clients of the Hugging Face Hub do not accept as a namespace."""
_NUMBER_DIGITS = 18
_NUMBER = rf"(?:0|[1-9][0-9]{{0,{_NUMBER_DIGITS - 1}}})"  # not \d, which matches the digits of every script
_IDENTIFIER = rf"(?:{_NUMBER}|[0-9]*[A-Za-z-][0-9A-Za-z-]*)"
_VERSION = re.compile(rf"v?({_NUMBER})\.({_NUMBER})\.({_NUMBER})(?:-({_IDENTIFIER}(?:\.{_IDENTIFIER})*))?")
_EXACT = re.compile(r"v?\d+\.\d+\.\d+(?:[-+]\S*)?")
_UNKNOWN = rf"({_NUMBER}|[xX*])"
_PARTIAL = re.compile(
    rf"v?{_UNKNOWN}(?:\.{_UNKNOWN}(?:\.{_UNKNOWN}(?:-({_IDENTIFIER}(?:\.{_IDENTIFIER})*))?(?:\+[0-9A-Za-z.-]+)?)?)?"
)
_WORD = re.compile(r"(~>?|\^|[<>]=?|=?)(.*)")
_SPACED = re.compile(r"(~>?|\^|[<>]=?|=)\s+")
_BETWEEN = re.compile(r"\s*(\S+)\s+-\s+(\S+)\s*")
_MAX_RANGE_CHARS = 256

_ALIKE = 0.6
"""Minimum similarity of a known name that is suggested for an unknown one."""

MAX_NEAR = 1_000
"""Maximum number of known names that an unknown one is compared with."""

MAX_VERSION_CHARS = 80
"""Keeps `sort_key` within the 200 characters of its column: a pre-release of single digits grows fivefold per two
characters."""

Digest = NewType("Digest", str)
"""A sha256 as 64 lower-case hexadecimal digits."""
ABSENT = Digest("0" * 64)
"""A digest that no bytes have: requesting it shows whether a store answers."""


def nearest(text: str, known: Iterable[str], otherwise: str) -> str:
    """The next step for an unknown name: the nearest known names, then `otherwise`."""
    near = get_close_matches(text, list(known), n=3, cutoff=_ALIKE)
    # A long common namespace makes any two names alike: the parts behind it must be, too.
    own = text.rpartition("/")[2]
    near = [name for name in near if get_close_matches(own, [name.rpartition("/")[2]], cutoff=_ALIKE)]
    return f"Did you mean {' or '.join(near)}? {otherwise}" if near else otherwise


def parse_digest(text: str) -> Digest:
    """Parses a SHA-256 in hexadecimal. Raises Usage for anything else."""
    if not _DIGEST.fullmatch(text):
        raise Usage("bad_digest", f"Invalid SHA-256 {text[:80]!r}.")
    return Digest(text)


def parse_name(text: str, what: str) -> str:
    """Parses the name of a namespace, a repository, a channel, a base or a suite."""
    if not _PART.fullmatch(text):
        raise Usage(
            "bad_name",
            f"{text[:80]!r} is not a valid {what}.",
            subject=text[:80],
            next_step="Use at most 64 of a-z, 0-9, '.', '_' and '-', beginning and ending with a letter or digit.",
        )
    return text


def parse_node_name(text: str, what: str) -> str:
    """Parses the name of a group of nodes, or of a node, which may be a host's."""
    if not _NODE.fullmatch(text):
        raise Usage(
            "bad_name",
            f"{text[:120]!r} is not a valid {what}.",
            subject=text[:120],
            next_step="Use at most 100 of a-z, 0-9, '.', '_' and '-', beginning and ending with a letter or digit.",
        )
    return text


@dataclass(frozen=True, slots=True)
class RepositoryName:
    """NAMESPACE/NAME."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


def parse_repository(text: str) -> RepositoryName:
    """Parses `namespace/name`. Raises Usage for anything else."""
    namespace, slash, name = text.partition("/")
    if not slash or "/" in name or namespace in ("", ".", "..", "~"):
        raise Usage("bad_repository", f"{text[:80]!r} is not a valid repository name.", subject=text[:80])
    return RepositoryName(parse_name(namespace, "namespace"), parse_name(name, "repository name"))


def refuse_reserved_namespace(name: str) -> None:
    """Raises Usage for a name that no new namespace may have."""
    if name in RESERVED_NAMESPACES:
        raise Usage(
            "namespace_reserved",
            f"{name} is reserved: addresses of the server begin with it.",
            subject=name,
        )


def refuse_git_name(name: RepositoryName) -> None:
    """Raises Usage for a new repository that clients of the Hugging Face Hub could not name."""
    if name.name.endswith(".git"):
        raise Usage(
            "bad_name",
            f"{name} is not allowed as a repository name: it ends in .git.",
            subject=str(name),
            next_step="Leave the .git out.",
        )


@total_ordering
@dataclass(frozen=True, slots=True)
class Version:
    """A semantic version without build metadata, which has no order and so could not identify a release."""

    major: int
    minor: int
    patch: int
    prerelease: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = f"{self.major}.{self.minor}.{self.patch}"
        return f"{text}-{'.'.join(self.prerelease)}" if self.prerelease else text

    def __lt__(self, other: "Version") -> bool:
        return self.sort_key < other.sort_key

    @property
    def stable(self) -> bool:
        return not self.prerelease

    @property
    def core(self) -> tuple[int, int, int]:
        return self.major, self.minor, self.patch

    @property
    def sort_key(self) -> str:
        """Text whose byte order is the order of semver 2.0.0 section 11, so that a database index sorts releases.

        Numbers are prefixed with their length (two digits). Identifiers end with a character below all others. A stable
        version has a mark above any pre-release.
        """
        core = "".join(_number_key(part) for part in (self.major, self.minor, self.patch))
        if self.stable:
            return core + "~"
        return core + "".join(_identifier_key(part) for part in self.prerelease)

    def bump(self, part: str) -> "Version":
        """The next version in that part. Raises Usage if its number is the largest that `parse_version` accepts."""
        if part == "major":
            bumped = Version(self.major + 1, 0, 0)
        elif part == "minor":
            bumped = Version(self.major, self.minor + 1, 0)
        else:
            bumped = Version(self.major, self.minor, self.patch + 1)
        if max(bumped.major, bumped.minor, bumped.patch) >= 10**_NUMBER_DIGITS:
            raise Usage(
                "version_ended",
                f"No {part} version follows {self}: a number has at most {_NUMBER_DIGITS} digits.",
                subject=str(self),
            )
        return bumped


def _number_key(number: int) -> str:
    digits = str(number)
    return f"{len(digits):02d}{digits}"


def _identifier_key(identifier: str) -> str:
    # A numeric identifier sorts below an alphanumeric one; "!" is below every character of an identifier.
    return f"0{_number_key(int(identifier))}!" if identifier.isdigit() else f"1{identifier}!"


def refuse_ambiguous_channel(name: str) -> None:
    """Raises Usage for the name of a new channel that reads as a version or a commit."""
    if is_version(name) or _COMMIT.fullmatch(name):
        raise Usage(
            "bad_name",
            f"{name!r} is not allowed as a channel name: it reads as a {'version' if is_version(name) else 'commit'}.",
            subject=name,
            next_step="Name the channel after its use, such as prod.",
        )


def is_version(text: str) -> bool:
    """Whether `parse_version` accepts the text."""
    return _match_version(text) is not None


def parse_version(text: str) -> Version:
    """Parses a version, with or without the `v` of a git tag."""
    match = _match_version(text)
    if match is None:
        raise Usage(
            "bad_version",
            f"{text[:80]!r} is not a semantic version, or not one with numbers below 10^{_NUMBER_DIGITS}.",
            subject=text[:80],
        )
    major, minor, patch, prerelease = match.groups()
    return Version(int(major), int(minor), int(patch), tuple(prerelease.split(".")) if prerelease else ())


def _match_version(text: str) -> re.Match[str] | None:
    return _VERSION.fullmatch(text) if len(text.removeprefix("v")) <= MAX_VERSION_CHARS else None


@dataclass(frozen=True, slots=True)
class Range:
    """An npm range: alternatives of bounds that must all hold.

    Pre-releases match only beside a bound that names one of the same MAJOR.MINOR.PATCH; otherwise users of stable
    releases would get a candidate. The rules are node-semver's (docs: semver ranges): `^1.2`, `~1.2.3`, `>=1.0 <2.0`,
    `1.x`, `1.0 - 2.0`, `a || b`.
    """

    text: str
    alternatives: tuple[tuple["_Bound", ...], ...]

    def __contains__(self, version: Version) -> bool:
        return any(_all_hold(bounds, version) for bounds in self.alternatives)


@dataclass(frozen=True, slots=True)
class _Bound:
    operator: str
    version: Version

    def holds(self, version: Version) -> bool:
        return _COMPARE[self.operator](version, self.version)


_COMPARE: dict[str, Callable[[Version, Version], bool]] = {"<": lt, "<=": le, ">": gt, ">=": ge, "=": eq}


def _all_hold(bounds: tuple[_Bound, ...], version: Version) -> bool:
    named = (bound.version.core for bound in bounds if not bound.version.stable)
    return all(bound.holds(version) for bound in bounds) and (version.stable or version.core in named)


def parse_range(text: str) -> Range:
    """Parses an npm range: `^1.2`, `~1.2.3`, `>=1.0 <2.0 || 3.x`. Raises Usage for anything else."""
    if len(text) <= _MAX_RANGE_CHARS:
        alternatives = [_bounds(part) for part in text.split("||")]
        if text.strip() and None not in alternatives:
            return Range(text, tuple(bounds for bounds in alternatives if bounds is not None))
    raise Usage("bad_range", f"{text[:80]!r} is neither a version nor a range.", subject=text[:80])


def _bounds(text: str) -> tuple[_Bound, ...] | None:
    """The bounds of one alternative; an empty list matches everything. None if it cannot be parsed."""
    if between := _BETWEEN.fullmatch(text):
        first, last = (_Partial.of(group) for group in between.groups())
        return first and last and (*first.bounds(">="), *last.bounds("<="))
    bounds: list[_Bound] = []
    for word in _SPACED.sub(r"\1", text).split():
        match = _WORD.fullmatch(word)
        partial = _Partial.of(match.group(2)) if match else None
        if match is None or partial is None:
            return None
        bounds += partial.bounds(match.group(1))
    return tuple(bounds)


@dataclass(frozen=True, slots=True)
class _Partial:
    """A version with only its first `known` numbers given; the others are 0."""

    version: Version
    known: int

    @classmethod
    def of(cls, text: str) -> "_Partial | None":
        match = _PARTIAL.fullmatch(text)
        if match is None:
            return None
        *numbers, prerelease = match.groups()
        known = next((index for index, number in enumerate(numbers) if number is None or number in "xX*"), 3)
        core = [int(number) if index < known else 0 for index, number in enumerate(numbers)]
        named = tuple(prerelease.split(".")) if prerelease and known == 3 else ()
        return cls(Version(core[0], core[1], core[2], named), known)

    def bounds(self, operator: str) -> tuple[_Bound, ...]:
        version, known = self.version, self.known
        lowest = _Bound(">=", version)
        if operator == "^":
            leading = next((index for index, number in enumerate(version.core) if number), 2)
            return (lowest, self._below(min(leading, known - 1))) if known else ()
        if operator in ("~", "~>"):
            return (lowest, self._below(min(1, known - 1))) if known else ()
        if known == 3:
            return (_Bound(operator or "=", version),)
        if not known:
            return (_Bound("<", Version(0, 0, 0, ("0",))),) if operator in ("<", ">") else ()
        if operator == "<":
            return (_Bound("<", replace(version, prerelease=("0",))),)
        after = self._below(known - 1)
        if operator == ">":
            return (_Bound(">=", replace(after.version, prerelease=())),)
        return {">=": (lowest,), "<=": (after,)}.get(operator, (lowest, after))

    def _below(self, index: int) -> _Bound:
        """The bound below the next version in that part and below its pre-releases."""
        core = [*self.version.core[:index], self.version.core[index] + 1, 0, 0][:3]
        return _Bound("<", Version(core[0], core[1], core[2], ("0",)))


@dataclass(frozen=True, slots=True)
class Reference:
    """At most one of version, range, channel and commit is set; none of them means the highest stable release."""

    repository: RepositoryName
    version: Version | None = None
    range: Range | None = None
    channel: str | None = None
    commit: str | None = None

    def __str__(self) -> str:
        if self.version:
            return f"{self.repository}:{self.version}"
        if self.range:
            return f"{self.repository}:{self.range.text}"
        if self.channel:
            return f"{self.repository}@{self.channel}"
        return f"{self.repository}#{self.commit}" if self.commit else str(self.repository)


def parse_reference(text: str) -> Reference:
    """Parses a repository with at most one of `:VERSION`, `:RANGE`, `@CHANNEL` and `#COMMIT`. Raises Usage for anything
    else."""
    match = re.search(r"[:@#]", text)
    if not match:
        return Reference(parse_repository(text))
    repository, rest = parse_repository(text[: match.start()]), text[match.end() :]
    if match.group() == "@":
        return Reference(repository, channel=parse_name(rest, "channel"))
    if match.group() == "#":
        if not _COMMIT.fullmatch(rest):
            raise Usage("bad_commit", f"Invalid commit {rest[:80]!r}.", subject=text[:160])
        return Reference(repository, commit=rest)
    if _EXACT.fullmatch(rest):
        return Reference(repository, version=parse_version(rest))
    return Reference(repository, range=parse_range(rest))


def single_version(target: str, bump: str | None) -> Reference:
    """Parses REPO:VERSION, or REPO if a `bump` determines the version. Raises Usage for anything else."""
    reference = parse_reference(target)
    if reference.range or reference.channel or reference.commit or bool(reference.version) == bool(bump):
        both = f" and --bump {bump} do" if bump else " does"
        raise Usage("bad_target", f"{target}{both} not name a single version.", subject=target)
    return reference


def parse_channel_reference(text: str) -> tuple[RepositoryName, str]:
    """Parses `REPO@CHANNEL`, the argument of rollback, history and gate."""
    reference = parse_reference(text)
    if reference.channel is None:
        raise Usage("bad_channel", f"{text[:160]!r} does not name a channel.", subject=text[:160])
    return reference.repository, reference.channel


ALL_REPOSITORIES = "*"


@dataclass(frozen=True, slots=True)
class PolicyScope:
    """The channels that a policy is for: NAMESPACE/NAME@CHANNEL or, with `*` as the name, the channels of that name in
    every repository of the namespace."""

    namespace: str
    name: str
    channel: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}@{self.channel}"

    @property
    def of_namespace(self) -> bool:
        return self.name == ALL_REPOSITORIES

    def in_namespace(self) -> "PolicyScope":
        """The scope of the namespace's policy for channels of this name."""
        return PolicyScope(self.namespace, ALL_REPOSITORIES, self.channel)


def parse_policy_scope(text: str) -> PolicyScope:
    """Parses `REPO@CHANNEL` or `NAMESPACE/*@CHANNEL`."""
    namespace, slash, rest = text.partition("/")
    if slash and rest.startswith(f"{ALL_REPOSITORIES}@"):
        channel = parse_name(rest.removeprefix(f"{ALL_REPOSITORIES}@"), "channel")
        return PolicyScope(parse_name(namespace, "namespace"), ALL_REPOSITORIES, channel)
    repository, channel = parse_channel_reference(text)
    return PolicyScope(repository.namespace, repository.name, channel)
