"""Laws of the manifest: an order-free identity, and paths that cannot leave their directory."""

import hashlib
from pathlib import Path, PureWindowsPath

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from registry.errors import Invalid
from registry.manifest import ManifestFile, canonical_manifest, check_path, commit_id
from registry.names import Digest

segments = st.from_regex(r"\A[a-zA-Z0-9_é-]{1,8}\Z")
paths = st.lists(segments, min_size=1, max_size=3).map("/".join)
digests = st.binary(max_size=4).map(lambda data: Digest(hashlib.sha256(data).hexdigest()))
files = st.builds(ManifestFile, paths, st.integers(0, 2**40), digests)
manifests = st.lists(files, min_size=1, max_size=8, unique_by=lambda file: file.path.casefold())
hostile = st.one_of(st.text(max_size=30), st.text("./\\:ab \0\n~C", max_size=14))


@given(manifests, st.randoms())
def test_the_order_of_files_does_not_change_the_commit(listed: list[ManifestFile], random: st.DataObject) -> None:
    shuffled = list(listed)
    random.shuffle(shuffled)
    assert commit_id(canonical_manifest(shuffled)) == commit_id(canonical_manifest(listed))


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


@given(paths)
def test_ordinary_paths_are_accepted(path: str) -> None:
    assert check_path(path) == path


@pytest.mark.parametrize("path", ["../outside", "a/../b", "/etc/passwd", "C:\\x", "a\\b", ".", "..", "a/", "\ud800"])
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
