"""Laws of names, versions, ranges and references, beside semantic_version and a small reading of npm's rules."""

from dataclasses import replace
from typing import Any

import pytest
import semantic_version
from hypothesis import assume, example, given
from hypothesis import strategies as st

from registry.database.tables import Release
from registry.errors import Usage
from registry.formats import references
from registry.formats.references import Reference, RepositoryName, Version, parse_range, parse_reference, parse_version

small = st.integers(0, 3)
numbers = st.one_of(small, st.integers(0, 10**18 - 1))
words = st.from_regex(r"\A[0-9]{0,3}[A-Za-z-][0-9A-Za-z-]{0,5}\Z")
identifiers = st.one_of(numbers.map(str), words, st.sampled_from(["a", "alpha", "beta", "rc", "-", "0a", "a-1", "Z"]))
prereleases = st.one_of(st.just(()), st.lists(identifiers, min_size=1, max_size=4).map(tuple))
versions = st.builds(Version, numbers, numbers, numbers, prereleases).filter(
    lambda version: len(str(version)) <= references.MAX_VERSION_CHARS
)
near = st.builds(Version, small, small, small, st.one_of(st.just(()), st.just(("rc", "1")), st.just(("rc", "2"))))
parts = st.from_regex(r"\A[a-z0-9]([a-z0-9._-]{0,20}[a-z0-9])?\Z")
repositories = st.builds(RepositoryName, parts, parts)
stable = near.filter(lambda version: version.stable)
ranges = st.builds("{}{}".format, st.sampled_from(["^", "~", ">=", ">", "<", "<=", ""]), near)
commits = st.from_regex(r"\A[0-9a-f]{7,40}\Z")
hostile = st.one_of(st.text(max_size=60), st.text("acme/sql:@#.-_^~<>=|*xX 0129٣\n\0é", max_size=40))


@given(versions)
def test_the_v_of_a_tag_changes_no_version(version: Version) -> None:
    assert parse_version(f"v{version}") == version
    assert parse_reference(f"acme/sql:v{version}") == parse_reference(f"acme/sql:{version}")
    assert version in parse_range(f"v{version}")


@given(versions, versions)
def test_versions_are_ordered_as_semantic_version_orders_them(one: Version, other: Version) -> None:
    reference, other_reference = semantic_version.Version(str(one)), semantic_version.Version(str(other))
    assert (one < other) == (reference < other_reference)
    assert (one == other) == (reference == other_reference)


@given(versions, versions)
def test_the_byte_order_of_sort_keys_is_the_order_of_versions(one: Version, other: Version) -> None:
    ours, theirs = one.sort_key.encode("ascii"), other.sort_key.encode("ascii")
    assert (ours < theirs) == (semantic_version.Version(str(one)) < semantic_version.Version(str(other)))


@given(versions)
@example(Version(0, 0, 0, ("0",) * ((references.MAX_VERSION_CHARS - 5) // 2)))
def test_every_accepted_version_fits_its_columns(version: Version) -> None:
    accepted = parse_version(str(version))
    assert len(accepted.sort_key) <= Release.__table__.c.sort_key.type.length
    assert len(str(accepted)) <= Release.__table__.c.version.type.length


@given(st.one_of(versions.map(str), hostile))
@example("1٣.0.0")
@example("1.0.0-٣")
@example("1.2.0\n")
@example("01.2.0")
@example("1.2.0+build")
def test_a_version_is_written_as_it_was_read_or_is_refused(text: str) -> None:
    try:
        version = parse_version(text)
    except Usage:
        return
    assert str(version) == text.removeprefix("v")
    assert semantic_version.Version(text.removeprefix("v")) == semantic_version.Version(str(version))


@given(versions, st.sampled_from(["major", "minor", "patch"]))
def test_a_bump_is_the_next_stable_version_above(version: Version, part: str) -> None:
    assume(getattr(version, part) < 10**18 - 1)
    bumped = version.bump(part)
    assert bumped.stable
    assert bumped > version
    assert parse_version(str(bumped)) == bumped, "whatever is counted up can be asked for"


@pytest.mark.parametrize("part", ["major", "minor", "patch"])
def test_the_largest_number_is_not_counted_up(part: str) -> None:
    largest = Version(*[10**18 - 1 if part == part_name else 0 for part_name in ("major", "minor", "patch")])
    assert parse_version(str(largest)) == largest
    with pytest.raises(Usage, match="at most 18 digits") as raised:
        largest.bump(part)
    assert "REPO:VERSION" in raised.value.next_step


any_reference = st.one_of(
    st.builds(Reference, repositories),
    st.builds(Reference, repositories, version=versions),
    st.builds(Reference, repositories, channel=parts),
    st.builds(Reference, repositories, commit=commits),
)


@given(any_reference)
def test_a_reference_survives_being_written_and_read(reference: Reference) -> None:
    assert parse_reference(str(reference)) == reference


@given(repositories, ranges.filter(lambda text: not text[0].isdigit()))
def test_a_range_in_a_reference_survives_being_written_and_read(repository: RepositoryName, text: str) -> None:
    reference = parse_reference(f"{repository}:{text}")
    assert reference.range is not None
    assert str(reference) == f"{repository}:{text}"
    assert str(parse_reference(str(reference))) == str(reference)


def allowed_by_npm(text: str, version: Version) -> bool:
    """node-semver's rules for one comparator: bounds, and pre-releases only beside a pre-release of the same core."""
    operator = text.rstrip("0123456789.-rc")
    bound = parse_version(text[len(operator) :])
    core = (bound.major, bound.minor, bound.patch)
    if not version.stable and (bound.stable or (version.major, version.minor, version.patch) != core):
        return False
    if operator == "^":
        part = "major" if bound.major else "minor" if bound.minor else "patch"
        return bound <= version < replace(bound, prerelease=()).bump(part)
    if operator == "~":
        return bound <= version < replace(bound, prerelease=()).bump("minor")
    return {">=": version >= bound, "<": version < bound, ">": version > bound, "<=": version <= bound}.get(
        operator, version == bound
    )


@given(ranges, near)
def test_a_range_holds_what_npm_says_it_holds(text: str, version: Version) -> None:
    assert (version in parse_range(text)) == allowed_by_npm(text, version)


@given(ranges, ranges, near)
def test_ranges_side_by_side_are_both_and_with_bars_either(one: str, other: str, version: Version) -> None:
    candidate = semantic_version.Version(str(version))
    inside, other_inside = version in parse_range(one), version in parse_range(other)
    if version.stable:
        assert (version in parse_range(f"{one} || {other}")) == (inside or other_inside)
        assert (version in parse_range(f"{one} {other}")) == (inside and other_inside)
        # The library holds 1.2.1 to be outside ~1.2.0-rc.1, and 1.0.0 to be 1.0.0-rc.1, and inside <=1.0.0-rc.1.
        assert inside == (candidate in semantic_version.NpmSpec(one)) or "rc" in one


EDGES = (
    *("0.0.0", "0.0.9", "0.9.9", "1.0.0", "1.2.0", "1.2.3", "1.2.9", "1.3.0", "1.9.9", "2.0.0-rc.1", "2.0.0", "2.5.0"),
    *("3.0.0-rc.1", "3.0.0-rc.2", "3.0.0", "3.0.9", "9.9.9"),
)


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("*", "0.0.0 0.0.9 0.9.9 1.0.0 1.2.0 1.2.3 1.2.9 1.3.0 1.9.9 2.0.0 2.5.0 3.0.0 3.0.9 9.9.9"),
        ("1.x || >=2.5", "1.0.0 1.2.0 1.2.3 1.2.9 1.3.0 1.9.9 2.5.0 3.0.0 3.0.9 9.9.9"),
        ("1", "1.0.0 1.2.0 1.2.3 1.2.9 1.3.0 1.9.9"),
        ("1.2", "1.2.0 1.2.3 1.2.9"),
        (">1.2", "1.3.0 1.9.9 2.0.0 2.5.0 3.0.0 3.0.9 9.9.9"),
        ("<=1.2", "0.0.0 0.0.9 0.9.9 1.0.0 1.2.0 1.2.3 1.2.9"),
        ("<1.x", "0.0.0 0.0.9 0.9.9"),
        ("^0.0", "0.0.0 0.0.9"),
        ("^0.x", "0.0.0 0.0.9 0.9.9"),
        ("~1", "1.0.0 1.2.0 1.2.3 1.2.9 1.3.0 1.9.9"),
        ("1.2 - 2", "1.2.0 1.2.3 1.2.9 1.3.0 1.9.9 2.0.0 2.5.0"),
        ("3.0.0-rc.1 - 3.0.0", "3.0.0-rc.1 3.0.0-rc.2 3.0.0"),
        (">=3.0.0-rc.1 <3.0.0", "3.0.0-rc.1 3.0.0-rc.2"),
        ("<3.0.0-rc.2", "0.0.0 0.0.9 0.9.9 1.0.0 1.2.0 1.2.3 1.2.9 1.3.0 1.9.9 2.0.0 2.5.0 3.0.0-rc.1"),
        ("~3.0.0-rc.1", "3.0.0-rc.1 3.0.0-rc.2 3.0.0 3.0.9"),
        ("^2.0.0-rc.1", "2.0.0-rc.1 2.0.0 2.5.0"),
        (">= v1.2.3 < 2", "1.2.3 1.2.9 1.3.0 1.9.9"),
        (">*", ""),
    ],
)
def test_a_range_holds_the_same_of_these_as_with_npm_itself(text: str, held: str) -> None:
    parsed = parse_range(text)
    assert [edge for edge in EDGES if parse_version(edge) in parsed] == held.split()


@pytest.mark.parametrize(
    "text", ["", " ", "^", "1.2.3.4", ">>1", "a", "1 -2", "^1.2 junk", "01.2.3", "1" * 300, "1.2.3-"]
)
def test_what_is_no_range_is_one_clear_error(text: str) -> None:
    with pytest.raises(Usage, match="neither a version nor a range"):
        parse_range(text)


@pytest.mark.parametrize(
    "parse", [parse_reference, parse_version, parse_range, references.parse_repository,
              references.parse_channel_reference, references.parse_digest,
              lambda text: references.parse_name(text, "channel")]
)  # fmt: skip
@given(text=hostile)
@example(text="acme/sql:" + "9" * 5000)
@example(text="9" * 5000 + ".0.0")
@example(text=">=1.0.0 <")
@example(text="acme/../sql")
@example(text="acme/sql@prod@prod")
def test_whatever_is_no_name_is_a_usage_error_and_nothing_else(parse: Any, text: str) -> None:
    refusal: Usage | None = None
    try:
        parse(text)
    except Usage as error:
        refusal = error
    assert refusal is None or refusal.next_step, "a refusal says what to write instead"
