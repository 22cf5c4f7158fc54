"""The results behind a score are kept as long as it, and no longer."""

from collections.abc import Generator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from registry.errors import Invalid, NotFound
from registry.transfer.collect import collect
from registry.transfer.resources import Resources
from tests.durability.conftest import broken_promises, opened
from tests.durability.small import write_adapter
from tests.scenarios.stored import lose
from tests.scenarios.traces import api_of, traces
from tests.scenarios.world import Cli

SUITE = {"name": "said", "kind": "target", "chat": False, "examples": [{"prompt": "a", "completion": "b"}] * 3}
PATH = "/v1/adapters/acme/sql/releases/1.0.0/scores"


@pytest.fixture
def held(environ: dict[str, str]) -> Generator[Resources]:
    resources = opened(environ)
    yield resources
    resources.close()


def recorded(nats: list[float], digest: str, **changes: Any) -> dict[str, Any]:
    value = sum(nats) / (2 * len(nats))
    score = {"suite_digest": digest, "metric": "nll", "value": value, "n": len(nats), "higher_is_better": False}
    examples = [{"nats": nat, "tokens": 2, "score": 0.0} for nat in nats]
    return {"scores": [score | changes], "results": [{"suite_digest": digest, "examples": examples}]}


def test_results_stay_as_long_as_their_score_and_go_once_another_replaces_them(
    environ: dict[str, str], held: Resources, tmp_path: Path
) -> None:
    cli = Cli(environ)
    cli.ok("push", write_adapter(tmp_path / "adapter", 1), "acme/sql:1.0.0", "--base", "tiny")
    later = replace(held, clock=lambda: datetime.now(UTC) + timedelta(days=3))
    with api_of(cli) as api:
        digest = api.post("/v1/suites", SUITE)["digest"]
        before = traces(cli).blobs
        api.post(PATH, recorded([1.0, 2.0, 3.5], digest))
        [first] = traces(cli).blobs - before
        collect(later, grace=timedelta(0))
        document = api.get(f"{PATH}/said/results")
        assert [row["nats"] for row in document["examples"]] == [1.0, 2.0, 3.5]
        assert (document["suite"], document["suite_digest"]) == ("said", digest)
        assert broken_promises(environ, read_bytes=True) == []

        api.post(PATH, recorded([1.0, 2.0, 3.0], digest))
        collect(later, grace=timedelta(0))
        [second] = traces(cli).blobs - before
        assert second != first
        assert api.get(f"{PATH}/said/results")["examples"][2]["nats"] == 3.0

        api.post(PATH, {"scores": recorded([4.0] * 3, digest)["scores"]})
        with pytest.raises(NotFound, match="no results by example"):
            api.get(f"{PATH}/said/results")
        collect(later, grace=timedelta(0))
        assert traces(cli).blobs == before


@pytest.mark.on("PostgreSQL")
def test_results_that_a_score_is_not_made_of_are_refused_and_not_stored(
    environ: dict[str, str], tmp_path: Path
) -> None:
    cli = Cli(environ)
    cli.ok("push", write_adapter(tmp_path / "adapter", 1), "acme/sql:1.0.0", "--base", "tiny")
    with api_of(cli) as api:
        digest = api.post("/v1/suites", SUITE)["digest"]
        before = traces(cli)
        for wrong in (
            recorded([1.0, 2.0, 3.0], digest, value=1.1),
            recorded([1.0, 2.0], digest),
            recorded([1.0, 2.0, 3.0], digest, metric="rouge_l"),
        ):
            with pytest.raises(Invalid, match="results of"):
                api.post(PATH, wrong)
        assert traces(cli) == before


def test_a_check_names_results_that_the_store_has_lost(environ: dict[str, str], tmp_path: Path) -> None:
    cli = Cli(environ)
    cli.ok("push", write_adapter(tmp_path / "adapter", 1), "acme/sql:1.0.0", "--base", "tiny")
    with api_of(cli) as api:
        digest = api.post("/v1/suites", SUITE)["digest"]
        before = traces(cli).blobs
        api.post(PATH, recorded([1.0, 2.0, 3.0], digest))
        [blob] = traces(cli).blobs - before
    lose(cli, blob)
    [message] = broken_promises(environ)
    assert "the results behind 1 score" in message
