"""Laws of the manifest: an order-free identity, and paths that cannot leave their directory."""

import hashlib
import unicodedata
from pathlib import Path, PureWindowsPath
from random import Random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from registry.errors import Invalid
from registry.formats.manifest import MAX_PART_BYTES, ManifestFile, canonical_manifest, check_path, commit_id
from registry.formats.references import Digest

segments = st.from_regex(r"\A[a-zA-Z0-9_é-]{1,8}\Z")
paths = st.lists(segments, min_size=1, max_size=3).map("/".join)
digests = st.binary(max_size=4).map(lambda data: Digest(hashlib.sha256(data).hexdigest()))
files = st.builds(ManifestFile, paths, st.integers(0, 2**40), digests)
letters = st.sampled_from("aAbéÉ") | st.sampled_from(["e\u0301", "E\u0301", "ß", "SS"])
crowded = st.lists(st.lists(letters, min_size=1, max_size=3).map("/".join), min_size=1, max_size=4)
"""Paths that often meet."""
hostile = st.one_of(st.text(max_size=30), st.text("./\\:ab \0\n~C", max_size=14))


def folded(path: str) -> str:
    return unicodedata.normalize("NFC", path).casefold()


def apart(listed: list[ManifestFile]) -> list[ManifestFile]:
    """Paths that do not collide with earlier ones."""
    kept: dict[str, ManifestFile] = {}
    for file in listed:
        mine = folded(file.path)
        if not any(f"{other}/".startswith(f"{mine}/") or f"{mine}/".startswith(f"{other}/") for other in kept):
            kept[mine] = file
    return list(kept.values())


manifests = st.lists(files, min_size=1, max_size=8).map(apart)


@given(manifests, st.randoms())
def test_the_order_of_files_does_not_change_the_commit(listed: list[ManifestFile], random: Random) -> None:
    shuffled = list(listed)
    random.shuffle(shuffled)
    assert commit_id(canonical_manifest(shuffled)) == commit_id(canonical_manifest(listed))


@pytest.mark.long
@given(manifests, manifests)
def test_other_files_are_another_commit(one: list[ManifestFile], other: list[ManifestFile]) -> None:
    same = set(one) == set(other)
    assert (commit_id(canonical_manifest(one)) == commit_id(canonical_manifest(other))) == same


@given(st.one_of(hostile, paths))
@example("../outside")
@example("a/../../outside")
@example("/etc/passwd")
@example("C:evil")
@example("..\\outside")
@example("a//b")
@example("a/./b")
@example("")
@example("a/.. ")
@example("a/...")
@example("\ud800")
@example("\u202egpj.x")
@example("x\u2028y")
@example("\u00e9" * 121)
def test_an_accepted_path_stays_below_any_directory(path: str) -> None:
    try:
        accepted = check_path(path)
    except Invalid:
        return
    root = Path("/where/it/is/pulled")
    assert accepted == path
    assert (root / path).is_relative_to(root)
    assert ".." not in (root / path).parts
    windows = PureWindowsPath(path)
    assert (windows.drive, windows.root) == ("", "")
    assert ".." not in [part.rstrip(". ") or ".." for part in windows.parts]
    assert path.encode("utf-8"), "what cannot be written as UTF-8 has no manifest"
    assert max(len(part.encode()) for part in path.split("/")) <= MAX_PART_BYTES
    assert not {unicodedata.category(character) for character in path} & {"Cc", "Cf", "Cs", "Zl", "Zp"}


@given(paths)
def test_ordinary_paths_are_accepted(path: str) -> None:
    assert check_path(path) == path


def test_a_name_may_be_as_long_as_a_file_system_takes_with_what_a_copy_adds() -> None:
    assert check_path("x" * MAX_PART_BYTES + "/" + "é" * (MAX_PART_BYTES // 2))
    for path in ("x" * (MAX_PART_BYTES + 1), "a/" + "é" * (MAX_PART_BYTES // 2) + "x", "a/" * 200 + "b"):
        with pytest.raises(Invalid):
            check_path(path)


CLIMBING = ["../outside", "a/../b", "/etc/passwd", "C:\\x", "a\\b", ".", "..", "a/"]
UNSEEN = ["\ud800", "\u202egpj.x", "x\u0085y", "a/x\u200by", "x\u2028y", "x\u2029y", "x\x7fy", "x\ny"]


@pytest.mark.parametrize("path", CLIMBING + UNSEEN, ids=ascii)
def test_a_path_that_climbs_or_is_odd_is_refused(path: str) -> None:
    with pytest.raises(Invalid):
        canonical_manifest([ManifestFile(path, 1, Digest("0" * 64))])


def test_two_files_of_one_name_are_refused() -> None:
    twins = [ManifestFile("README.md", 1, Digest("0" * 64)), ManifestFile("readme.md", 1, Digest("1" * 64))]
    with pytest.raises(Invalid):
        canonical_manifest(twins)
    with pytest.raises(Invalid):
        canonical_manifest([twins[0], twins[0]])
    with pytest.raises(Invalid):
        canonical_manifest([])


@pytest.mark.parametrize(
    "paths",
    [
        ["x", "x/y"],
        ["x/y/z", "x"],
        ["x", "x-1", "x/y"],
        ["X", "x/y"],
        ["caf\u00e9", "cafe\u0301"],
        ["caf\u00e9", "CAFE\u0301/x"],
        ["straße", "STRASSE"],
    ],
    ids=ascii,
)
def test_files_that_some_disk_would_put_in_one_place_are_refused(paths: list[str]) -> None:
    with pytest.raises(Invalid, match="collide"):
        canonical_manifest([ManifestFile(path, 1, Digest("0" * 64)) for path in paths])


@given(crowded)
def test_a_manifest_is_accepted_exactly_when_every_file_has_a_place_of_its_own(paths: list[str]) -> None:
    listed = [ManifestFile(path, 1, Digest("0" * 64)) for path in paths]
    if len(apart(listed)) == len(listed):
        assert canonical_manifest(listed)
        return
    with pytest.raises(Invalid):
        canonical_manifest(listed)
