"""Who says that a score was measured: workers attest what they measured, and everybody else states it."""

import json
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from sqlalchemy import select

from registry.database.tables import Score
from registry.domain.access import worker_keys
from registry.domain.access.audit import operator_actor
from registry.domain.catalog import attestations, releases, suites
from registry.domain.catalog.attestations import About
from registry.errors import Invalid, RegistryError, Usage
from registry.formats.attestations import EVIDENCE, SCORES, attest, new_key, open_attestation, public_half
from registry.formats.evidence import Served, decide, evidence_of
from registry.formats.references import parse_repository, parse_version
from tests.scenarios.test_evaluations import write_suite
from tests.scenarios.traces import api_of, opened
from tests.scenarios.world import Cli

POLICY = """
version: 1
missing: refuse
rules:
  - {rule: said.accuracy >= 0, measured: worker}
"""


def test_evidence_is_made_by_a_worker_on_a_suite_that_allows_it(team: Cli, tmp_path: Path) -> None:
    team.ok("suite", "add", write_suite(tmp_path, "said", evidence=True))
    missing = team("evidence", "acme/sql:1.0.0")
    assert (missing.code, "acme/sql:1.0.0 has no evidence" in missing.err) == (3, True)
    team.ok("suite", "add", write_suite(tmp_path, "kept-back"))
    refused = team("evidence", "acme/sql:1.0.0", "--suite", "said", "--suite", "kept-back")
    assert (refused.code, "kept-back does not state `evidence: true`" in refused.err) == (1, True)
    assert team.json("show", "acme/sql:1.0.0")["scores"] == [], "nothing was measured"
    before = team.json("show", "acme/sql:1.0.0")["commit"]
    document = team.json("evidence", "acme/sql:1.0.0", "--suite", "said")
    statement = open_attestation(document["envelope"], document["key"]["public_key"])
    examples = evidence_of(statement)
    assert len(examples) == 8
    assert decide(examples, [example.release for example in examples]) == Served(1.0, 0.0)
    assert decide(examples, [example.base for example in examples]).verdict() == "failed"
    suite = {score["suite_digest"] for score in team.json("show", "acme/sql:1.0.0")["scores"]}
    assert statement.subjects["suite said"] in suite
    assert team.json("show", "acme/sql:1.0.0")["commit"] == before
    listed = team.json("verify", "acme/sql:1.0.0", "--attestations", tmp_path / "attested")["attestations"]
    assert sorted((row["kind"], row["suite"]) for row in listed) == [("evidence", "said"), ("scores", "said")]
    assert [len(list((tmp_path / "attested").glob(f"*-{row['kind']}.dsse.json"))) for row in listed] == [1, 1]
    assert (
        "evidence on said (8 examples) of acme/sql:1.0.0 attested by worker" in team.ok("verify", "acme/sql:1.0.0").out
    )
    assert "8 examples" in team.ok("evidence", "acme/sql:1.0.0").out


def test_a_rule_believes_the_worker_that_measured_and_not_what_a_publisher_typed(team: Cli, tmp_path: Path) -> None:
    team.ok("suite", "add", write_suite(tmp_path, "said"))
    (tmp_path / "policy.yaml").write_text(POLICY)
    team.ok("policy", "set", "acme/sql@prod", tmp_path / "policy.yaml")
    team.ok("eval", "acme/sql:1.0.0", "--suite", "said")
    assert {score["stated_by"] for score in team.json("show", "acme/sql:1.0.0")["scores"]} == {"mia"}
    refused = team("promote", "acme/sql:1.0.0", "--to", "prod")
    assert (refused.code, "no worker attests that it measured it" in refused.err) == (1, True)

    team.ok("eval", "acme/sql:1.0.0", "--suite", "said", "--queue")
    scores = {score["metric"]: score for score in team.json("show", "acme/sql:1.0.0")["scores"]}
    [key] = team.json("worker-key", "list")["items"]
    assert {(score["measured_by"], score["stated_by"]) for score in scores.values()} == {(key["worker"], None)}
    home = Path(team.environment["ADAPTORY_HOME"])
    assert (home / "worker-key.pem").stat().st_mode & 0o777 == 0o600
    verified = team.json("verify", "acme/sql:1.0.0", "--attestations", tmp_path / "attested")
    [attested] = verified["attestations"]
    assert attested["predicate"]["scores"][1]["value"] == scores["accuracy"]["value"]
    assert (attested["worker"], attested["key"]) == (key["worker"], key["id"])
    envelope = json.loads((tmp_path / "attested" / "1-scores.dsse.json").read_text())
    assert envelope["payloadType"] == "application/vnd.in-toto+json"
    team.ok("promote", "acme/sql:1.0.0", "--to", "prod")
    check_measured_again(team, key)

    attested_one = select(Score).where(Score.metric == "accuracy", Score.attestation_id.is_not(None))
    with closing(opened(team)) as resources:
        for name, edited in (("value", 0.99), ("stderr", 0.5), ("n", 8_000), ("higher_is_better", False)):
            with resources.write() as session:
                score = session.scalars(attested_one).one()
                before = getattr(score, name)
                setattr(score, name, edited)
            assert "not what a worker attested" in team("verify", "acme/sql:1.0.0").err, name
            with resources.write() as session:
                setattr(session.scalars(attested_one).one(), name, before)
    team.ok("worker-key", "revoke", key["id"][:12])
    revoked = team.json("show", "acme/sql:1.0.0")["scores"]
    assert {score["measured_by"] for score in revoked} == {None}
    check_revoked(team, key)
    stopped = team("eval", "acme/sql:1.0.0", "--suite", "said", "--queue")
    assert (stopped.code, "was revoked" in stopped.err) == (1, True)


def check_measured_again(team: Cli, key: Mapping[str, str]) -> None:
    team.ok("eval", "acme/sql:1.0.0", "--suite", "said", "--queue")
    assert [row["newest"] for row in team.json("verify", "acme/sql:1.0.0")["attestations"]] == [False, True]
    first, second = team.ok("verify", "acme/sql:1.0.0").out.splitlines()
    assert (first.endswith(", measured again since"), second.endswith(key["id"][:12])) == (True, True)


def check_revoked(team: Cli, key: Mapping[str, str]) -> None:
    verified = team.json("verify", "acme/sql:1.0.0")
    assert (verified["attestations"], {row["key"] for row in verified["revoked"]}) == ([], {key["id"]})
    said = f"not attested: key {key['id'][:12]} of worker {key['worker']} was revoked by mia at 20"
    assert team.ok("verify", "acme/sql:1.0.0").out.count(said) == 2


def typed_by_a_publisher(team: Cli, tmp_path: Path) -> list[tuple[str, str]]:
    """What somebody may try to pass off as a worker's, and why it does not count; empty if it does."""
    digest = team.json("suite", "add", write_suite(tmp_path, "said", evidence=True))["digest"]
    team.ok("suite", "add", write_suite(tmp_path, "other", chat=False))
    score = {"suite_digest": digest, "metric": "accuracy", "value": 1.0, "n": 8, "higher_is_better": True}
    path, tried = "/v1/adapters/acme/sql/releases/1.0.0", list[tuple[str, str]]()
    with api_of(team) as api:
        names = ("measured_by", "worker", "attestation", "attestation_id", "key", "envelope", "by_worker", "attested")
        for name in names:
            with suppress(Invalid, Usage):
                api.post(f"{path}/scores", {"scores": [{**score, name: "gpu-1"}]})
            measured = {row["measured_by"] for row in team.json("show", "acme/sql:1.0.0")["scores"]}
            tried.append((f"a score with {name}", "" if measured - {None} else "stated"))
        for name in ("attestations", "evidence", "worker-keys"):
            for method in (api.post, api.put):
                to = f"/v1/{name}" if name == "worker-keys" else f"{path}/{name}"
                tried.append((f"{method.__name__} {name}", _refusal(partial(method, to, {"envelope": "{}"}))))
    with closing(opened(team)) as resources, resources.write() as session:
        actor = operator_actor("gpu-1", datetime.now(UTC))
        private = new_key()
        key = worker_keys.register(session, "gpu-1", public_half(private), actor)
        sql, terraform = (
            releases.find(session, parse_repository(f"acme/{name}"), parse_version("1.0.0"))
            for name in ("sql", "terraform")
        )
        said, other = suites.find(session, "said"), suites.find(session, "other")
        about = About(sql, said)
        keep = partial(attestations.keep, session, actor, about, key)
        right = about.statement(SCORES, {"scores": []})
        forged = {
            f"another {name}": attest(private, replace(right, subjects={**right.subjects, name: "0" * 64}))
            for name in about.content()
        }
        forged["another release"] = attest(private, About(terraform, said).statement(SCORES, {}))
        forged["another suite"] = attest(private, About(sql, other).statement(EVIDENCE, {}))
        forged["an unknown key"] = attest(new_key(), right)
        tried += [(f"an attestation: {what}", _refusal(partial(keep, text))) for what, text in forged.items()]
        assert keep(attest(private, right)).key_id == key.id
        worker_keys.revoke(session, actor, key.id)
        tried.append(("an attestation: a revoked key", _refusal(partial(keep, attest(private, right)))))
        session.rollback()
    return tried


def _refusal(call: Callable[[], object]) -> str:
    try:
        call()
    except RegistryError as error:
        return error.detail
    return ""


def test_nothing_that_a_publisher_types_passes_as_a_workers(team: Cli, tmp_path: Path) -> None:
    tried = typed_by_a_publisher(team, tmp_path)
    assert [what for what, why in tried if not why] == []
    for what, why in tried:
        if what.startswith("an attestation"):
            assert any(words in why for words in ("not accepted", "was not made by", "revoked")), (what, why)
    assert len(tried) >= 20
