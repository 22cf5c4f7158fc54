"""What fsck says of a registry that is well: how much it looked at, or that there was nothing to look at."""

from pathlib import Path

import pytest

from registry.client.push import collect
from tests.scenarios.world import Cli
from tests.staying_whole.small import write_adapter


@pytest.fixture
def furnished(place: dict[str, str], tmp_path: Path) -> Cli:
    """Two releases of three different files and one channel."""
    cli = Cli(place)
    for seed, version in enumerate(("1.0.0", "1.1.0")):
        cli.ok("push", write_adapter(tmp_path / version, seed), f"acme/sql:{version}", "--base", "tiny")
    cli.ok("promote", "acme/sql:1.0.0", "--to", "prod")
    return cli


def test_a_clean_registry_is_called_clean_with_what_was_looked_at(furnished: Cli, tmp_path: Path) -> None:
    files = {file.manifest.sha256: file.manifest for name in ("1.0.0", "1.1.0") for file in collect(tmp_path / name)}
    size_bytes = sum(file.size_bytes for file in files.values())
    assert furnished.json("fsck")["checked"] == {
        "releases": 2,
        "revisions": 2,
        "channels": 1,
        "blobs": len(files),
        "size_bytes": size_bytes,
    }
    told = furnished.ok("fsck").out
    assert f"clean: 2 releases, 1 channels, {len(files)} blobs (" in told
    assert "sizes only" in told
    assert "every byte read" in furnished.ok("fsck", "--full").out


def test_a_registry_with_nothing_in_it_is_not_called_clean_without_more(place: dict[str, str]) -> None:
    """Who meant another database, or lost one, must see it."""
    told = Cli(place).ok("fsck").out
    assert "nothing to check" in told
    assert place.get("ADAPTORY_DATABASE_URL", place["ADAPTORY_HOME"]).rpartition("/")[2] in told
    assert set(Cli(place).json("fsck")["checked"].values()) == {0}
