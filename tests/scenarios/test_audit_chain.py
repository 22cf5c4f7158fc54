"""The audit log is a hash chain: who changes or deletes a row with SQL is shown by `fsck` and by a checkpoint kept
elsewhere."""

import json
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from sqlalchemy import text

from registry.domain.access import audit_chain
from registry.domain.access.audit import Act, operator_actor, record
from registry.formats.audit_chain import next_seal
from registry.transfer.sealing import Sealer, seal_all
from tests.eventually import eventually
from tests.scenarios.test_policies import working
from tests.scenarios.traces import opened
from tests.scenarios.world import Cli, World


def execute(cli: Cli, statement: str, **values: object) -> None:
    """Runs SQL in the registry's own database, as somebody who has its password."""
    resources = opened(cli)
    with resources.write() as session:
        session.execute(text(statement), values)
    resources.close()


def numbered(cli: Cli, statement: str) -> int:
    resources = opened(cli)
    with resources.read() as session:
        value = int(session.execute(text(statement)).scalar_one())
    resources.close()
    return value


def kept(cli: Cli, directory: Path, *options: str) -> Path:
    directory.mkdir(exist_ok=True)
    path = directory / "checkpoint.json"
    path.write_text(cli.ok("audit", "checkpoint", *options).out)
    return path


def second_row(cli: Cli) -> int:
    return numbered(cli, "SELECT id FROM audit ORDER BY id LIMIT 1 OFFSET 1")


def changed_actor(cli: Cli) -> str:
    execute(cli, "UPDATE audit SET actor = 'mallory' WHERE id = :row", row=second_row(cli))
    return "was changed"


def deleted_row(cli: Cli) -> str:
    execute(cli, "DELETE FROM audit WHERE id = :row", row=second_row(cli))
    return "was deleted after it was sealed"


def deleted_with_its_seal(cli: Cli) -> str:
    row = second_row(cli)
    execute(cli, "DELETE FROM audit_seals WHERE audit_id = :row", row=row)
    execute(cli, "DELETE FROM audit WHERE id = :row", row=row)
    return "seals are missing"


def changed_with_its_content(cli: Cli) -> str:
    row = second_row(cli)
    changed_actor(cli)
    resources = opened(cli)
    with resources.read() as session:
        (forged,) = (now for seal, now in audit_chain.sealed_rows(session, after=0, limit=100) if seal.audit_id == row)
    resources.close()
    assert forged is not None
    content = next_seal(None, forged).content
    execute(cli, "UPDATE audit_seals SET content = :content WHERE audit_id = :row", content=content, row=row)
    return "has a changed seal"


@pytest.mark.parametrize("tamper", [changed_actor, deleted_row, deleted_with_its_seal, changed_with_its_content])
def test_a_row_that_sql_changed_or_deleted_is_named_by_fsck_and_by_a_checkpoint(
    stocked_embedded: Cli, tmp_path: Path, tamper: Callable[[Cli], str]
) -> None:
    cli = stocked_embedded
    checkpoint = kept(cli, tmp_path)
    assert "was sealed" not in cli.ok("fsck").out
    assert "and their rows are those of the checkpoint" in cli.ok("audit", "verify", checkpoint).out
    expected = tamper(cli)
    refused = cli("fsck")
    assert (refused.code, expected in refused.out + refused.err) == (1, True), refused
    compared = cli("audit", "verify", checkpoint)
    assert (compared.code, expected in compared.out) == (1, True), compared


def test_a_log_whose_chain_was_computed_again_does_not_match_a_checkpoint(
    stocked_embedded: Cli, tmp_path: Path
) -> None:
    cli = stocked_embedded
    checkpoint = kept(cli, tmp_path)
    changed_actor(cli)
    execute(cli, "DELETE FROM audit_seals")
    again = kept(cli, tmp_path / "again")
    assert cli("fsck").code == 0, "the chain alone cannot show it"
    compared = cli("audit", "verify", checkpoint)
    assert (compared.code, "are not those of the checkpoint" in compared.out) == (1, True), compared
    assert cli("audit", "verify", again).code == 0
    execute(cli, "DELETE FROM audit_seals")
    compared = cli("audit", "verify", checkpoint)
    assert (compared.code, "the log only" in compared.out) == (1, True), compared


def test_a_signed_checkpoint_is_accepted_only_with_the_key_that_signed_it(
    stocked_embedded: Cli, tmp_path: Path
) -> None:
    cli, keys = stocked_embedded, [Ed25519PrivateKey.generate() for _ in range(2)]
    for number, key in enumerate(keys):
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        (tmp_path / f"{number}.pem").write_bytes(private)
        public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        (tmp_path / f"{number}.pub").write_bytes(public)
    checkpoint = kept(cli, tmp_path, "--key", str(tmp_path / "0.pem"))
    assert cli.json("audit", "verify", checkpoint, "--key", tmp_path / "0.pub")["matches"] is True
    assert cli("audit", "verify", checkpoint, "--key", tmp_path / "1.pub").code != 0
    plain = tmp_path / "plain.json"
    plain.write_text(cli.ok("audit", "checkpoint").out)
    assert "bad_checkpoint" in cli("audit", "verify", plain, "--key", tmp_path / "0.pub", "--json").out
    for text_ in ("", "{}", "[1]", '{"number": true, "digest": "", "at": ""}', "\x00" * 100):
        plain.write_text(text_)
        refused = cli("audit", "verify", plain, "--json")
        assert "bad_checkpoint" in refused.out, refused


def test_a_worker_seals_rows_within_seconds_and_rows_without_one_are_named_by_fsck(
    stocked_embedded: Cli, world: World
) -> None:
    cli = stocked_embedded
    cli.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny")
    assert numbered(cli, "SELECT count(*) FROM audit_seals") == 0
    execute(cli, "UPDATE audit SET at = '2020-01-01 00:00:00.000000'")
    assert "audit rows are not sealed" in (cli("fsck").out + cli("fsck").err)
    with working(cli):
        eventually(lambda: numbered(cli, "SELECT count(*) FROM audit_seals") > 0)
    assert "not sealed" not in cli.ok("fsck").out


@pytest.mark.on("PostgreSQL")
def test_removing_a_user_rewrites_sealed_rows_and_the_chain_says_so(stocked_embedded: Cli, tmp_path: Path) -> None:
    cli = stocked_embedded
    cli.ok("namespace", "grant", "acme", "pia", "publisher")
    checkpoint = kept(cli, tmp_path)
    cli.ok("user", "remove", "pia")
    assert "not sealed" not in cli.ok("fsck").out
    result = cli.json("audit", "verify", checkpoint)
    assert (result["matches"], [row["rows"] for row in result["rewritten"]]) == (True, [1])
    resources = opened(cli)
    with resources.write() as session:
        seal, now = audit_chain.sealed_rows(session, after=0, limit=1)[0]
        assert now is not None
        session.execute(text("UPDATE audit SET actor = 'mallory' WHERE id = :row"), {"row": seal.audit_id})
        forged = next_seal(audit_chain.last(session), {**now, "actor": "mallory"}, result["rewritten"][0]["removal"])
        assert audit_chain.add(session, audit_chain.last(session), [forged])
    resources.close()
    refused = cli("audit", "verify", checkpoint)
    assert (refused.code, f"row {seal.audit_id} " in refused.out) == (1, True), "a removal covers only what it rewrote"


@pytest.mark.on("PostgreSQL")
def test_processes_that_seal_at_once_make_one_chain(stocked_embedded: Cli) -> None:
    cli = stocked_embedded
    resources = opened(cli)

    def write(count: int) -> None:
        for number in range(count):
            with resources.write() as session:
                actor = operator_actor("pia", datetime.now(UTC))
                record(session, actor, Act.NAMESPACE_SET, f"acme/{number}", namespace="acme")

    sealers = [Sealer() for _ in range(3)]
    writers = [threading.Thread(target=write, args=(60,)) for _ in range(2)]
    turning = [threading.Thread(target=lambda one=one: [one.turn(resources) for _ in range(40)]) for one in sealers]
    for thread in (*writers, *turning):
        thread.start()
    for thread in (*writers, *turning):
        thread.join()
    seal_all(resources)
    with resources.read() as session:
        assert list(audit_chain.check(session)) == []
        links = audit_chain.sealed_rows(session, after=0, limit=10_000)
    resources.close()
    assert [seal.number for seal, _ in links] == list(range(1, len(links) + 1))
    assert len({seal.audit_id for seal, _ in links}) == len(links) >= 120


def test_downloads_are_logged_if_the_operator_asks_and_stay_outside_the_chain(
    stocked_embedded: Cli, world: World, tmp_path: Path
) -> None:
    cli = stocked_embedded
    cli.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny")
    cli.ok("push", world.adapters["other-sql"], "acme/sql:1.1.0", "--base", "tiny")
    cli.ok("pull", "acme/sql:1.1.0", "-o", tmp_path / "unlogged")
    logged = Cli({**cli.environment, "ADAPTORY_AUDIT_READS": "true"})
    logged.ok("pull", "acme/sql:1.0.0", "-o", tmp_path / "logged")
    rows = cli.json("audit", "--event", "release:download")["items"]
    assert {row["subject"] for row in rows} == {"acme/sql:1.0.0"}
    assert {row["namespace"] for row in rows} == {"acme"}
    assert "adapter_model.safetensors" in {row["detail"]["path"] for row in rows}
    assert [row for row in cli.json("audit")["items"] if row["act"] == "release:download"] == []
    assert cli.json("audit", "verify", kept(cli, tmp_path))["rows"] == len(cli.json("audit")["items"])


def test_an_export_has_a_line_of_json_or_of_the_common_event_format_for_each_row(stocked_embedded: Cli) -> None:
    cli = stocked_embedded
    cli.ok("namespace", "grant", "acme", "pia|=\\x", "publisher")
    rows = [json.loads(line) for line in cli.ok("audit", "export").out.splitlines()]
    lines = cli.ok("audit", "export", "--format", "cef").out.splitlines()
    assert len(rows) == len(lines)
    assert [row["id"] for row in rows] == sorted(row["id"] for row in rows)
    granted = next(line for line in lines if "|member:set|" in line)
    assert granted.startswith("CEF:0|Adaptory|registry|")
    assert "cs1Label=subject cs1=acme/members/pia|\\=\\\\x" in granted
