"""What every kind of server does: tests of the fixtures `server` and `directory` of the module that imports them."""

import shutil
from pathlib import Path

import pytest

from registry.agent.directory import MirrorDirectory
from registry.agent.servers.protocol import Server
from registry.agent.versions import ServedVersion
from registry.errors import RegistryError

COMMIT = "ab" * 20


def one_release(root: Path, adapter: Path, commit: str = COMMIT) -> MirrorDirectory:
    """A mirror's directory with one release."""
    kept = MirrorDirectory(root)
    shutil.copytree(adapter, kept.path(commit))
    return kept


def version(number: str = "1.0.0", commit: str = COMMIT) -> ServedVersion:
    return ServedVersion("acme/sql", number, commit)


def test_a_version_is_listed_with_its_directory_until_it_is_unloaded(
    server: Server, directory: MirrorDirectory
) -> None:
    assert server.loaded() == {}
    server.load(version(), directory.path(COMMIT))
    server.load(version("1.1.0"), directory.path(COMMIT))
    listed = server.loaded()
    assert sorted(listed) == ["acme/sql@1.0.0", "acme/sql@1.1.0"]
    assert {directory.commit_of(path) for path in listed.values()} == {COMMIT}
    assert server.check("acme/sql@1.0.0").verdict == "unproved", "it answers, which proves nothing about the weights"
    server.unload("acme/sql@1.0.0")
    assert sorted(server.loaded()) == ["acme/sql@1.1.0"]


def test_a_second_load_of_the_same_directory_and_an_unload_of_nothing_are_no_errors(
    server: Server, directory: MirrorDirectory
) -> None:
    for _ in range(2):
        server.load(version(), directory.path(COMMIT))
    for _ in range(2):
        server.unload("acme/sql@1.0.0")
    assert server.loaded() == {}


def test_a_name_that_is_not_loaded_fails_its_check(server: Server) -> None:
    assert server.check("acme/sql@9.9.9").verdict == "failed"


def test_a_server_that_refuses_is_quoted(server: Server, directory: MirrorDirectory) -> None:
    with pytest.raises(RegistryError) as refused:
        server.load(version("2.0.0", "cd" * 20), directory.path("cd" * 20))
    assert refused.value.code in ("server_refused", "disk_error")
    assert "acme/sql@2.0.0" in refused.value.detail or "No adapter" in refused.value.detail
