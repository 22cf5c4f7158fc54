"""The real S3 server as a store of ours sees it."""

import pytest

from tests.registry.storage.corner import Corner
from tests.s3_server import S3Server


@pytest.fixture
def credentials(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.credentials.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(params=["the store checks", "we check"])
def corner(request: pytest.FixtureRequest, s3: S3Server, credentials: None) -> Corner:
    return Corner(s3, hash_arrivals=request.param == "we check")
