"""Laws of the semver check: breaking changes, the promise of a number, and the increments of `auto`."""

import pytest
import semantic_version
from hypothesis import given
from hypothesis import strategies as st

from registry.formats import compatibility
from registry.formats.compatibility import Surface, breaking_changes, outside_caret_range, required_bump, surface
from registry.formats.manifest import ManifestFile
from registry.formats.references import Digest, Version, parse_range, parse_version
from tests.registry.formats.test_names import near, stable, versions

CHANGES = ("breaking", "weights", "files")
stable_versions = versions.filter(lambda version: version.stable)
# A number has at most 18 digits, and the largest one has no successor.
followed_versions = stable_versions.filter(lambda one: max(one.major, one.minor, one.patch) < 10**18 - 1)

surfaces = st.builds(
    Surface,
    base=st.sampled_from(["a" * 64, "b" * 64]),
    type=st.sampled_from(["lora", "loha"]),
    variant=st.sampled_from(["lora", "rslora", "dora"]),
    rank_max=st.integers(1, 4),
    touched=st.frozensets(st.sampled_from(["q_proj", "k_proj", "v_proj"])),
    weights=st.just(frozenset()),
)


@given(stable_versions, stable_versions)
def test_a_release_may_break_just_where_no_caret_range_leads_to_it(old: Version, new: Version) -> None:
    held = semantic_version.Version(str(new)) in semantic_version.NpmSpec(f"^{old}")
    if new >= old:
        assert outside_caret_range(old, new) == (not held)


@given(stable, near)
def test_a_prerelease_may_break_what_the_release_it_leads_to_may(old: Version, new: Version) -> None:
    assert outside_caret_range(old, new) == outside_caret_range(old, Version(new.major, new.minor, new.patch))


@given(followed_versions)
def test_the_bump_of_a_breaking_change_leaves_the_caret_range_and_no_lesser_one_would(old: Version) -> None:
    part = required_bump("breaking", old)
    assert outside_caret_range(old, old.bump(part))
    lesser = ("major", "minor", "patch")[("major", "minor", "patch").index(part) + 1 :]
    assert not any(outside_caret_range(old, old.bump(smaller)) for smaller in lesser)


@given(followed_versions.filter(lambda version: version.major or version.minor), st.sampled_from(["weights", "files"]))
def test_the_bump_of_any_other_change_stays_in_the_caret_range(old: Version, change: str) -> None:
    assert old.bump(required_bump(change, old)) in parse_range(f"^{old}")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("version", "bumped"),
    [
        ("1.4.2", ("2.0.0", "1.5.0", "1.4.3")),
        ("0.4.2", ("0.5.0", "0.4.3", "0.4.3")),
        ("0.0.2", ("0.0.3", "0.0.3", "0.0.3")),
    ],
)
def test_in_0_y_z_the_first_number_that_is_not_zero_counts_as_the_major_one(
    version: str, bumped: tuple[str, str, str]
) -> None:
    old = parse_version(version)
    assert tuple(str(old.bump(required_bump(change, old))) for change in CHANGES) == bumped


@given(surfaces)
def test_a_release_does_not_break_itself(one: Surface) -> None:
    assert breaking_changes(one, one) == []


@given(surfaces, surfaces, surfaces)
def test_what_breaks_over_two_steps_broke_in_one_of_them(one: Surface, two: Surface, three: Surface) -> None:
    if breaking_changes(one, three):
        assert breaking_changes(one, two) or breaking_changes(two, three)


@given(surfaces, surfaces)
def test_a_change_breaks_for_the_reasons_that_the_contract_names(old: Surface, new: Surface) -> None:
    assert {finding.code for finding in breaking_changes(old, new)} == {
        code
        for code, holds in {
            "new_base": new.base != old.base,
            "other_type": (new.type, new.variant) != (old.type, old.variant),
            "larger_rank": (new.rank_max or 0) > (old.rank_max or 0),
            "more_targets": not new.touched <= old.touched,
        }.items()
        if holds
    }


def test_replaced_modules_count_as_touched_and_only_weights_as_weights() -> None:
    facts = {"targets": ["q_proj"], "modules_to_save": ["lm_head", "model.score"], "rank_max": 4}
    files = [ManifestFile(path, 1, Digest("a" * 64)) for path in ("adapter_model.safetensors", "README.md")]
    actual = surface("b" * 64, facts, files)
    assert actual.touched == {"q_proj", "lm_head", "score"}
    assert actual.weights == {("adapter_model.safetensors", "a" * 64)}
    assert compatibility.breaking_changes(surface("b" * 64, {}, []), surface("b" * 64, {}, files)) == [], (
        "a model has no facts of ranks"
    )


@given(st.lists(near, max_size=12), st.sampled_from(["^", "~", ">=", "<", "<=", ""]), stable)
def test_the_highest_of_a_range_is_the_one_that_semantic_version_selects(
    there: list[Version], operator: str, bound: Version
) -> None:
    """Of stable versions; a range without pre-releases selects none."""
    text = f"{operator}{bound}"
    ours = max((version for version in there if version in parse_range(text)), default=None)
    chosen = semantic_version.NpmSpec(text).select(
        [semantic_version.Version(str(version)) for version in there if version.stable]
    )
    assert (str(ours) if ours else None) == (str(chosen) if chosen else None)
