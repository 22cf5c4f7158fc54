"""A yank and a move wait for each other, so that a search by channel finds the release that the channel serves."""

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy.orm import Session

from registry.client.api import Api, line_path
from registry.domain.access.audit import Actor
from registry.domain.catalog import releases
from registry.domain.channels import promotions, withdrawals
from registry.domain.channels.moves import PromotionRequest
from registry.domain.search import search
from registry.domain.search.ordering import Order
from registry.domain.search.query import Query
from registry.errors import Refused
from registry.formats.references import Version
from registry.transfer.resources import Resources
from tests.doses import further
from tests.durability.conftest import broken_promises, opened
from tests.durability.processes import NAME
from tests.durability.small import write_adapter
from tests.durability.test_many_at_once import CLIENTS, clients, push_version, together, url
from tests.scenarios.world import Cli

__all__ = ["url"]
FIRST, SECOND = Version(1, 0, 0), Version(1, 1, 0)


def operator() -> Actor:
    return Actor("mia", datetime.now(UTC), {"*": "admin"})


def yank(session: Session, _channel: str) -> None:
    withdrawals.yank(session, operator(), releases.find(session, NAME, SECOND), "wrong data")


def promote(session: Session, channel: str) -> None:
    promotions.request(session, operator(), PromotionRequest(NAME, SECOND, channel))


@dataclass
class Two:
    """Two processes over one registry; the second acts before the first has finished."""

    first: Resources
    second: Resources

    def do(self, one: Callable[[Session, str], None], other: Callable[[Session, str], None], channel: str) -> None:
        def later() -> None:
            with self.second.write() as session:
                other(session, channel)

        with ThreadPoolExecutor(1) as pool:
            with self.first.write() as session:
                one(session, channel)
                waiting = pool.submit(later)
                with pytest.raises(TimeoutError):
                    waiting.result(0.5)
            waiting.result(20)

    def versions_on(self, channel: str) -> list[str]:
        with self.first.read() as session:
            hits = search.search(session, operator(), Query(channel=channel), Order()).hits
            return [session.get_one(releases.Release, hit.release_id).version for hit in hits]


@pytest.fixture
def two(environ: dict[str, str], tmp_path: Path) -> Generator[Two]:
    """Two releases; `prod` serves the first."""
    cli = Cli(environ)
    for seed, version in enumerate((FIRST, SECOND)):
        cli.ok("push", write_adapter(tmp_path / str(version), seed), f"{NAME}:{version}", "--base", "tiny")
    cli.ok("promote", f"{NAME}:{FIRST}", "--to", "prod")
    pair = Two(opened(environ), opened(environ))
    yield pair
    for held in (pair.first, pair.second):
        held.close()


@pytest.mark.parametrize("channel", ["prod", "edge"])
def test_a_move_waits_for_a_yank_and_then_sees_it(two: Two, environ: dict[str, str], channel: str) -> None:
    with pytest.raises(Refused) as caught:
        two.do(yank, promote, channel)
    assert caught.value.code == "release_yanked"
    assert two.versions_on(channel) == (["1.0.0"] if channel == "prod" else [])
    assert broken_promises(environ) == []


@pytest.mark.on("PostgreSQL")
@pytest.mark.parametrize("channel", ["prod", "edge"])
def test_a_yank_waits_for_a_move_and_the_channel_gives_out_what_lies_below(
    two: Two, environ: dict[str, str], channel: str
) -> None:
    two.do(promote, yank, channel)
    assert two.versions_on(channel) == (["1.0.0"] if channel == "prod" else [])
    assert broken_promises(environ) == []


@pytest.mark.long
@pytest.mark.parametrize("turns", [9, *further(24)])
def test_moves_beside_yanks_leave_searches_with_what_the_channels_give_out(
    environ: dict[str, str], url: str, tmp_path: Path, turns: int
) -> None:
    """To existing channels and to new ones: nobody can lock a channel that another transaction is about to create."""
    with clients(url) as apis:
        for number in range(3):
            push_version(apis[0], tmp_path, f"1.{number}.0", number)

        def race(number: int, api: Api) -> object:
            for turn in range(turns):
                if number % 4 == 0:  # 1.2.0 is never yanked, and the others are in the end
                    what, version = "yank" if turn % 2 else "unyank", f"1.{(number // 4 + turn) % 2}.0"
                    api.post(f"{line_path(NAME)}/releases/{version}/{what}", {"reason": "to see what comes of it"})
                    continue
                version = f"1.{(number + turn) % 3}.0"
                try:
                    api.put(f"{line_path(NAME)}/channels/{turn // 3}-{number % 3}", {"version": version})
                except Refused as error:
                    if error.code != "release_yanked":
                        raise
            return None

        assert together(apis, race) == [None] * CLIENTS
        for channel in apis[0].pages(f"{line_path(NAME)}/channels"):
            versions = [row["version"] for row in apis[0].pages("/v1/releases", channel=channel["channel"])]
            assert versions == [version for version in [channel["version"]] if version], channel
    assert broken_promises(environ) == []
