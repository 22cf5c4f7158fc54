"""The served check: a server's own log-probabilities decide whether it applies a release before users get it."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path

import pytest

from registry.agent.servers.protocol import CheckResult
from registry.agent.servers.vllm import VllmServer
from registry.agent.versions import ServedVersion
from registry.domain.access.audit import operator_actor
from registry.domain.catalog import releases, suites
from registry.domain.catalog.attestations import About
from registry.errors import Invalid
from registry.formats.attestations import EVIDENCE, Statement
from registry.formats.evidence import USUAL, EvidenceExample, Tolerance, decide, evidence_of
from registry.formats.references import parse_repository, parse_version
from registry.worker.attesting import attested
from tests.eventually import eventually
from tests.scenarios.test_evaluations import write_suite
from tests.scenarios.traces import opened
from tests.scenarios.world import Cli, World
from tests.serving.conftest import Site, mirrored
from tests.serving.contract import COMMIT, one_release
from tests.serving.double import BASE, double, log_probabilities, weights_hash
from tests.serving.scripted import models, ok, scripted

NAME = "acme/sql@1.0.0"
Check = tuple[str, CheckResult]
WRONG = ("unapplied", "previous", "other", "quantised", "quantised-other")
LENGTHS = ((7,), (12, 9), (30,), (4, 5, 6), (60, 2), (8,) * 8)


def examples(weights: str, lengths: Sequence[int]) -> list[EvidenceExample]:
    """The evidence of the adapter, as a worker would measure it of the double's model."""
    made: list[EvidenceExample] = []
    for number, length in enumerate(lengths):
        ids = [number + 3 * place for place in range(length + 5)]
        release, base = (tuple(log_probabilities(model, ids)[5:]) for model in (weights, BASE))
        made.append(EvidenceExample(tuple(ids), 5, release, base))
    return made


def checks(
    kinds: Sequence[str], lengths: Sequence[Sequence[int]], adapter: Path, root: Path, limits: Tolerance = USUAL
) -> Iterator[Check]:
    """The check of servers that apply the adapter, or what a kind of mistake makes of it."""
    weights, directory = weights_hash(adapter), one_release(root, adapter).path(COMMIT)
    for wrong in kinds:
        with double(wrong=wrong) as (url, _), closing(VllmServer(url, limits)) as server:
            server.load(ServedVersion("acme/sql", "1.0.0", COMMIT), directory)
            for some in lengths:
                yield wrong, server.check(NAME, examples(weights, some))
            assert server.check(NAME).verdict == "unproved", "nothing to compare it with"


@pytest.mark.parametrize(
    ("kinds", "lengths"),
    [pytest.param(WRONG[:1], LENGTHS, id="6"), pytest.param(WRONG, LENGTHS, id="30", marks=pytest.mark.long)],
)
def test_no_wrong_thing_is_proved(
    kinds: Sequence[str], lengths: Sequence[Sequence[int]], world: World, tmp_path: Path
) -> None:
    for wrong, result in checks(("", *kinds), lengths, world.adapters["sql"], tmp_path / "served"):
        assert result.verdict == ("failed" if wrong else "proved"), (wrong, result)
        assert result.served is not None
        assert not wrong or "worst token" in result.why
        if wrong == "unapplied":
            assert abs(result.served.share) < 0.01, "the base answers"


def test_a_stated_tolerance_proves_a_quantised_server_and_nothing_else(world: World, tmp_path: Path) -> None:
    limits = Tolerance.within(0.6)
    for wrong, result in checks(WRONG, LENGTHS[1:2], world.adapters["sql"], tmp_path / "served", limits):
        assert result.verdict == ("proved" if wrong == "quantised" else "failed"), (wrong, result)
        assert wrong != "quantised" or (result.served and result.served.worst > USUAL.worst)


def test_a_weak_adapter_is_proved_only_where_the_evidence_tells_it_from_its_base() -> None:
    weak = [EvidenceExample((1, 2, 3), 1, (-1.0, -1.0), (-1.1, -0.9))]
    for off, verdict in ((0.0, "proved"), (0.03, "unproved"), (0.06, "failed"), (0.1, "failed")):
        assert decide(weak, [[-1.0 - off, -1.0 + off]]).verdict() == verdict, "tokens up and down do not cancel"
    assert decide(weak, [[-1.06, -1.06]], Tolerance.within(1.0)).verdict() == "failed", (
        "however much a token may be off"
    )


@pytest.mark.parametrize("said", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_what_is_not_a_log_probability_fails_the_check_and_can_be_reported(said: str) -> None:
    rows = b'{"choices": [{"logprobs": {"tokens": ["token_id:2"], "token_logprobs": [%s]}}]}' % said.encode()
    with (
        scripted({"/v1/models": models(), "/v1/completions": ok(rows)}) as server,
        closing(VllmServer(server.url)) as kept,
    ):
        result = kept.check(NAME, [EvidenceExample((1, 2), 1, (-1.0,), (-4.0,))])
    assert (result.verdict, result.served and result.served.worst > 1000) == ("failed", True)
    assert isfinite(result.served.share) if result.served else False


def test_evidence_by_which_a_release_looks_like_its_base_proves_nothing() -> None:
    row = {"ids": [1, 2, 3], "start": 1, "release": [-1.0, -2.0], "base": [-1.0, -2.0]}
    with pytest.raises(Invalid, match="as its base does"):
        evidence_of(Statement(EVIDENCE, {}, {"examples": [row]}))
    for broken in ({}, {**row, "start": 0}, {**row, "base": [-1.0]}, {**row, "ids": "x"}):
        with pytest.raises(Invalid, match="do not have the form"):
            evidence_of(Statement(EVIDENCE, {}, {"examples": [broken]}))


def attest(site: Site, version: str, weights: str) -> None:
    """A worker of the registry attests that this is what the release answers."""
    embedded = Cli({"ADAPTORY_HOME": str(site.home), "ADAPTORY_USER": "mia"})
    rows = [
        {"ids": list(row.ids), "start": row.start, "release": list(row.release), "base": list(row.base)}
        for row in examples(weights, LENGTHS[1])
    ]
    with closing(opened(embedded)) as resources, resources.write() as session:
        release = releases.find(session, parse_repository("acme/sql"), parse_version(version))
        about = About(release, suites.find(session, "said"))
        actor = operator_actor("mia", datetime.now(UTC))
        assert attested(session, resources.settings, actor, about, (EVIDENCE, {"examples": rows}))


def test_a_route_moves_only_to_what_the_server_is_proved_to_apply(site: Site, world: World, tmp_path: Path) -> None:
    site.cli.ok("suite", "add", write_suite(tmp_path, "said", evidence=True))
    attest(site, "1.0.0", site.hashes["acme/sql@1.0.0"])
    attest(site, "1.1.0", weights_hash(world.adapters["terraform"]))  # the server will have something else
    with double() as (url, _), mirrored(site, "--server", f"vllm={url}", "--group", "serving") as agent:
        agent.wait_for("acme/sql@1.0.0")

        def status() -> dict[str, object]:
            return site.cli.json("rollout", "status", "acme/sql@prod")

        eventually(lambda: status()["proved"] == 1, within_s=30)
        site.promote("1.1.0")
        agent.wait_for_problem("does not apply acme/sql@1.1.0: share")
        assert agent.routed() == "acme/sql@1.0.0"
        eventually(lambda: "worst token" in str(status()["nodes"]), within_s=30)
        attest(site, "1.1.0", site.hashes["acme/sql@1.1.0"])
        agent.wait_for("acme/sql@1.1.0")
        eventually(lambda: status()["proved"] == 1, within_s=30)
        assert "proved on 1 of 1 node" in site.cli.ok("rollout", "status", "acme/sql@prod").out
