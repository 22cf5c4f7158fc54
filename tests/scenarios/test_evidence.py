"""Who says that a score was measured: workers attest what they measured, and everybody else states it."""

import json
from pathlib import Path

from registry.formats.attestations import open_attestation
from registry.formats.evidence import Served, decide, evidence_of
from tests.scenarios.test_evaluations import write_suite
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
    before = team.json("show", "acme/sql:1.0.0")["commit"]
    document = team.json("evidence", "acme/sql:1.0.0", "--suite", "said")
    statement = open_attestation(document["envelope"], document["key"]["public_key"])
    examples = evidence_of(statement)
    assert len(examples) == 8
    assert decide(examples, [example.release for example in examples]) == Served(1.0, 0.0)
    assert not decide(examples, [example.base for example in examples]).proved
    suite = {score["suite_digest"] for score in team.json("show", "acme/sql:1.0.0")["scores"]}
    assert statement.subjects["suite said"] in suite
    assert team.json("show", "acme/sql:1.0.0")["commit"] == before
    assert [row["kind"] for row in team.json("verify", "acme/sql:1.0.0")["attestations"]] == ["scores"]
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

    team.ok("worker-key", "revoke", key["id"][:12])
    revoked = team.json("show", "acme/sql:1.0.0")["scores"]
    assert {score["measured_by"] for score in revoked} == {None}
    assert team.json("verify", "acme/sql:1.0.0")["attestations"] == []
    stopped = team("eval", "acme/sql:1.0.0", "--suite", "said", "--queue")
    assert (stopped.code, "was revoked" in stopped.err) == (1, True)
