"""What the environment says, and what follows from it."""

from pathlib import Path

import pytest

from registry.settings import LocalStorage, S3Storage, Settings


def test_the_kind_of_storage_follows_from_the_rest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert Settings().storage == LocalStorage()
    monkeypatch.setenv("ADAPTORY_STORAGE__DIRECTORY", str(tmp_path))
    assert Settings().storage == LocalStorage(directory=tmp_path)
    monkeypatch.delenv("ADAPTORY_STORAGE__DIRECTORY")
    monkeypatch.setenv("ADAPTORY_STORAGE__BUCKET", "adapters")
    assert Settings().storage == S3Storage(bucket="adapters")
