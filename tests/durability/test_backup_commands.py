"""`adaptory backup` while others push, and `adaptory restore` into an empty registry of either kind."""

import gzip
import json
import os
import shutil
import signal
from collections.abc import Callable, Mapping
from datetime import timedelta
from hashlib import sha256
from pathlib import Path

import pytest
from sqlalchemy import MetaData

from registry.database import portable
from registry.database.engine import Database
from registry.database.migrate import migrate, migrations_directory
from registry.database.tables import Token
from registry.storage.archive import LocalArchive
from registry.transfer import backup
from tests import services
from tests.doses import further
from tests.durability.conftest import opened
from tests.durability.killed_backups import Quiet, back_up_and_die, restore_and_die
from tests.durability.small import write_adapter, write_base
from tests.durability.test_backup import busy
from tests.eventually import eventually
from tests.forked import start
from tests.s3_server import BUCKET
from tests.scenarios.world import Cli

Environment = dict[str, str]
DOCUMENTS = ("rows.jsonl.gz", "blobs.txt.gz", "manifest.json")


def other_kind(environ: Mapping[str, str], home: Path) -> Environment:
    """The environment of an empty registry of the other pairing, whose PostgreSQL database has no tables."""
    if "ADAPTORY_DATABASE_URL" in environ:
        return {"ADAPTORY_HOME": str(home), "ADAPTORY_USER": "mia"} | {
            name: value for name, value in environ.items() if name.startswith("AWS_")
        }
    store = services.shared_s3().environment(f"{home.name}-{os.urandom(4).hex()}/")
    url = services.new_database()
    return {"ADAPTORY_HOME": str(home), "ADAPTORY_USER": "mia", "ADAPTORY_DATABASE_URL": url, **store}


def target_of(environ: Mapping[str, str], tmp_path: Path) -> str:
    """A target: a directory, or a prefix in the bucket of a registry in S3."""
    prefix = environ.get("ADAPTORY_STORAGE__PREFIX")
    return f"s3://{BUCKET}/saved-{prefix}" if prefix else str(tmp_path / "saved")


def rows_of(environ: Mapping[str, str]) -> list[bytes]:
    resources = opened(environ)
    with resources.snapshot() as session:
        lines = list(portable.dump(session, portable.tables(backup.UNSAVED)))
    resources.close()
    return lines


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of an embedded registry with three releases, one of them served, scores, a token and a job."""
    directory = tmp_path_factory.mktemp("built")
    cli = Cli({"ADAPTORY_HOME": str(directory / "home"), "ADAPTORY_USER": "mia"})
    cli.ok("base", "add", write_base(directory / "base"), "--name", "tiny")
    filled(cli, directory)
    return directory / "home"


@pytest.fixture
def small(built: Path, tmp_path: Path) -> Cli:
    """A copy of that registry."""
    shutil.copytree(built, tmp_path / "home")
    return Cli({"ADAPTORY_HOME": str(tmp_path / "home"), "ADAPTORY_USER": "mia"})


def filled(cli: Cli, tmp_path: Path) -> Cli:
    suite = {"name": "exact", "kind": "target", "chat": False, "examples": [{"prompt": "a", "completion": "b"}]}
    (tmp_path / "suite.yaml").write_text(json.dumps(suite))
    cli.ok("suite", "add", tmp_path / "suite.yaml")
    for number in range(3):
        adapter = write_adapter(tmp_path / str(number), number)
        cli.ok("push", adapter, f"acme/sql:1.{number}.0", "--base", "tiny", "--notes", 'Müde \\ N\t"quoted"')
    cli.ok("promote", "acme/sql:1.0.0", "--to", "prod", "--reason", "first")
    cli.ok("promote", "acme/sql:1.1.0", "--to", "prod")
    cli.ok("rollback", "acme/sql@prod", "--reason", "worse")
    cli.ok("gate", "acme/sql@prod", "--rule", "exact.nll <= 9")
    cli.ok("deprecate", "acme/sql:1.0.0", "--reason", "old")
    cli.ok("namespace", "grant", "acme", "pia", "publisher")
    cli.ok("token", "create", "--user", "pia")
    return cli


@pytest.mark.on("PostgreSQL")
def test_a_backup_of_a_busy_registry_is_restored_on_the_other_database_and_store(
    environ: Environment, tmp_path: Path
) -> None:
    cli, target = Cli(environ), target_of(environ, tmp_path)
    with busy(environ, tmp_path / "adapters") as pushed:
        first, before = cli.json("backup", target), len(pushed)
        eventually(lambda: len(pushed) > before + 1)  # the first of them may have begun before the backup
        second = cli.json("backup", target)
    assert 0 < second["copied"] < second["blobs"] == first["copied"] + second["copied"], "it copies new blobs only"

    elsewhere = Cli(other_kind(environ, tmp_path / "restored"))
    if target.startswith("s3:"):
        refused = elsewhere("restore", target, "--json")
        assert refused.code == 7, "the store of the backup is not at Amazon"
    report = elsewhere.json("restore", target, *_endpoint(environ))
    assert report["fsck"]["clean"], report
    assert report["fsck"]["findings"] == [], "the backup has nothing that no release names"
    assert (report["name"], report["rows"]) == (second["name"], second["rows"])
    for release in elsewhere.json("list", "acme/sql")["items"]:
        directory = tmp_path / "pulled" / release["version"]
        elsewhere.ok("pull", f"acme/sql:{release['version']}", "-o", directory)
        for row in elsewhere.json("show", f"acme/sql:{release['version']}")["files"]:
            assert sha256((directory / row["path"]).read_bytes()).hexdigest() == row["sha256"]
    elsewhere.ok("push", write_adapter(tmp_path / "new", 999), "acme/sql:9.0.0", "--base", "tiny")
    elsewhere.ok("promote", "acme/sql:9.0.0", "--to", "prod")
    elsewhere.ok("rollback", "acme/sql@prod")
    assert elsewhere("fsck", "--full").code == 0


def _endpoint(environ: Mapping[str, str]) -> list[str]:
    url = environ.get("ADAPTORY_STORAGE__ENDPOINT_URL")
    return ["--endpoint-url", url] if url else []


@pytest.mark.long
def test_rows_come_back_exactly_from_one_database_to_the_other_and_back(small: Cli, tmp_path: Path) -> None:
    saved, environ = tmp_path / "saved", small.environment
    was = rows_of(environ)
    small.ok("backup", saved)
    there = other_kind(environ, tmp_path / "there")
    Cli(there).ok("restore", saved)
    assert rows_of(there) == was
    Cli(there).ok("backup", tmp_path / "again")
    back = other_kind(there, tmp_path / "back")
    Cli(back).ok("restore", tmp_path / "again")
    assert rows_of(back) == was


@pytest.mark.parametrize("last", [DOCUMENTS[2], *further("blob", *DOCUMENTS[:2])])
def test_a_killed_backup_does_not_exist_and_the_next_one_goes_on_with_its_blobs(
    small: Cli, tmp_path: Path, last: str
) -> None:
    saved = tmp_path / "saved"
    process = start(back_up_and_die, small.environment, str(saved), last)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    restored = Cli(other_kind({"ADAPTORY_DATABASE_URL": ""}, tmp_path / "restored"))
    refused = restored("restore", saved, "--json")
    assert (refused.code, refused.json["error"]["code"]) == (3, "backup_missing")
    report = small.json("backup", saved)
    assert report["copied"] < report["blobs"]
    assert restored.json("restore", saved)["fsck"]["findings"] == []


@pytest.mark.long
def test_a_killed_restore_leaves_an_empty_registry_and_may_be_repeated(small: Cli, tmp_path: Path) -> None:
    small.ok("backup", tmp_path / "saved")
    empty = other_kind({"ADAPTORY_DATABASE_URL": ""}, tmp_path / "restored")
    process = start(restore_and_die, empty, str(tmp_path / "saved"), "blob")
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert Cli(empty).json("list")["items"] == []
    report = Cli(empty).json("restore", tmp_path / "saved")
    assert report["fsck"]["clean"]
    assert 0 < report["kept"] == report["blobs"] - report["copied"]


def test_a_restore_that_was_killed_when_it_was_complete_says_so_when_it_is_repeated(small: Cli, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    name = small.json("backup", saved)["name"]
    empty = other_kind({"ADAPTORY_DATABASE_URL": ""}, tmp_path / "restored")
    process = start(restore_and_die, empty, str(saved), "rows")
    process.join()
    assert process.exitcode == -signal.SIGKILL
    was = rows_of(empty)
    refused = Cli(empty)("restore", saved, "--json")
    assert (refused.code, refused.json["error"]["code"]) == (4, "already_restored")
    assert f"of the backup {name} already" in refused.json["error"]["detail"]
    assert rows_of(empty) == was == rows_of(small.environment)
    Cli(empty).ok("migrate")
    Cli(empty).ok("fsck")
    Cli(empty).ok("yank", "acme/sql:1.2.0", "--reason", "changed since")
    refused = Cli(empty)("restore", saved, "--json")
    assert (refused.code, refused.json["error"]["code"]) == (4, "registry_not_empty")
    assert f"not the restored backup {name}, or was changed since" in refused.json["error"]["detail"]


def test_no_collection_runs_beside_a_backup_whose_blobs_it_could_take(environ: Environment, tmp_path: Path) -> None:
    cli = filled(Cli(environ), tmp_path)
    resources = opened(environ)
    codes: list[str] = []

    def collect() -> None:
        refused = Cli(environ)("gc", "--grace-hours", "0", "--json")
        codes.append(refused.json["error"]["code"])

    saved = backup.back_up(
        resources, LocalArchive(tmp_path / "saved"), keep=None, read_bytes=False, progress=Quiet(collect)
    )
    resources.close()
    assert codes == ["collecting"] * saved.manifest.blob_count
    cli.ok("gc", "--grace-hours", "0")


def test_a_registry_with_rows_is_not_restored_into(small: Cli, tmp_path: Path) -> None:
    small.ok("backup", tmp_path / "saved")
    small.ok("yank", "acme/sql:1.2.0", "--reason", "later than the backup")
    was = rows_of(small.environment)
    refused = small("restore", tmp_path / "saved", "--json")
    assert (refused.code, refused.json["error"]["code"]) == (4, "registry_not_empty")
    assert rows_of(small.environment) == was
    for store in (tmp_path / "home" / "store", f"{tmp_path}/home/../home/store"):
        refused = small("backup", store)
        assert refused.code == 2, refused.err
        assert "own store" in refused.err


@pytest.mark.parametrize("name", [DOCUMENTS[0], *further(*DOCUMENTS[1:])])
def test_a_damaged_document_of_a_backup_is_refused_by_name(small: Cli, tmp_path: Path, name: str) -> None:
    report = small.json("backup", tmp_path / "saved")
    path = tmp_path / "saved" / "snapshots" / report["name"] / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x80
    path.write_bytes(content)
    empty = Cli({"ADAPTORY_HOME": str(tmp_path / "restored")})
    refused = empty("restore", tmp_path / "saved")
    assert refused.code == 6
    assert f"{report['name']}/{name} of the backup is damaged" in refused.err
    assert empty.json("list")["items"] == []


@pytest.mark.parametrize(
    "change", [lambda _: b"", lambda rows: rows[: len(rows) // 2], lambda rows: rows + b"[]\n", lambda _: b"[" * 99_999]
)
def test_rows_that_somebody_else_has_written_are_refused_with_a_code(
    small: Cli, tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    snapshot = tmp_path / "saved" / "snapshots" / small.json("backup", tmp_path / "saved")["name"]
    rows = gzip.compress(change(gzip.decompress((snapshot / "rows.jsonl.gz").read_bytes())))
    (snapshot / "rows.jsonl.gz").write_bytes(rows)
    manifest = json.loads((snapshot / "manifest.json").read_text())
    described = {"sha256": sha256(rows).hexdigest(), "size_bytes": len(rows)}
    (snapshot / "manifest.json").write_text(json.dumps({**manifest, "rows": described}))
    empty = Cli({"ADAPTORY_HOME": str(tmp_path / "restored")})
    refused = empty("restore", tmp_path / "saved")
    assert (refused.code, "The backup has rows" in refused.err or "is damaged" in refused.err) == (6, True), refused.err
    assert empty.json("list")["items"] == []


def test_a_manifest_with_a_path_as_its_name_makes_no_file_there(small: Cli, tmp_path: Path) -> None:
    snapshot = tmp_path / "saved" / "snapshots" / small.json("backup", tmp_path / "saved")["name"]
    elsewhere = snapshot.rename(tmp_path / "elsewhere")
    snapshot.mkdir()
    manifest = json.loads((elsewhere / "manifest.json").read_text())
    (snapshot / "manifest.json").write_text(json.dumps({**manifest, "name": str(elsewhere)}))
    refused = Cli({"ADAPTORY_HOME": str(tmp_path / "restored")})("restore", tmp_path / "saved")
    assert refused.code == 6
    assert f"{snapshot.name}/manifest.json of the backup is damaged" in refused.err
    assert not [*tmp_path.glob("elsewhere-*")]


@pytest.mark.long
def test_damaged_blobs_are_seen_by_a_full_backup_by_a_restore_and_by_a_backup_of_them(
    small: Cli, tmp_path: Path
) -> None:
    saved = tmp_path / "saved"
    small.ok("backup", saved)
    row = next(row for row in small.json("show", "acme/sql:1.0.0")["files"] if row["path"].endswith(".safetensors"))
    key = Path("blobs", "sha256", row["sha256"][:2], row["sha256"])
    _damage(saved / key)

    restored = Cli({"ADAPTORY_HOME": str(tmp_path / "restored")})
    ran = restored("restore", saved, "--json")
    (finding,) = ran.json["fsck"]["findings"]
    assert (ran.code, finding["code"]) == (1, "blob_missing")
    assert "adapter_model.safetensors of acme/sql:1.0.0" in finding["message"]

    assert small.json("backup", saved)["copied"] == 0
    assert small.json("backup", saved, "--full")["copied"] == 1, "sizes alone do not show it"
    assert Cli({"ADAPTORY_HOME": str(tmp_path / "second")}).json("restore", saved)["fsck"]["clean"]

    _damage(tmp_path / "home" / "store" / key)
    (tmp_path / "home" / "store" / "blobs" / "sha256").joinpath(*_other_blob(small, row["sha256"])).unlink()
    ran = small("backup", tmp_path / "third", "--json")
    assert (ran.code, sorted(ran.json["missing"].values())) == (1, ["damaged", "missing"])
    assert ran.json["copied"] == ran.json["blobs"] - 2


def _damage(path: Path) -> None:
    path.chmod(0o644)
    path.write_bytes(bytes(path.stat().st_size))


def _other_blob(cli: Cli, sha256_: str) -> tuple[str, str]:
    rows = cli.json("show", "acme/sql:1.1.0")["files"]
    other = next(row["sha256"] for row in rows if row["path"].endswith(".safetensors") and row["sha256"] != sha256_)
    return other[:2], other


def test_only_the_newest_backups_are_kept_with_the_blobs_that_they_name(small: Cli, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    first = small.json("backup", saved)
    small.ok("push", write_adapter(tmp_path / "9", 9), "acme/sql:1.9.0", "--base", "tiny")
    extra = saved / "blobs" / "sha256" / "00" / ("0" * 64)
    extra.parent.mkdir(exist_ok=True)
    extra.write_bytes(b"of a backup that is gone")
    (saved / "snapshots" / "20200101T000000Z-killed").mkdir()
    (saved / "snapshots" / "20200101T000000Z-killed" / "rows.jsonl.gz").write_bytes(b"")
    second = small.json("backup", saved, "--keep", 2)
    assert (second["removed"], second["copied"]) == (1, 1)
    third = small.json("backup", saved, "--keep", 2)
    assert (third["removed"], third["copied"]) == (1, 0)
    assert sorted(path.name for path in (saved / "snapshots").iterdir()) == [second["name"], third["name"]]
    assert not extra.exists()
    refused = Cli({"ADAPTORY_HOME": str(tmp_path / "gone")})("restore", saved, "--name", first["name"])
    assert refused.code == 3
    assert second["name"] in refused.err
    older = Cli({"ADAPTORY_HOME": str(tmp_path / "kept")}).json("restore", saved, "--name", second["name"])
    assert (older["name"], older["fsck"]["findings"]) == (second["name"], [])


def test_a_backup_has_no_secret_and_no_session_and_only_its_owner_reads_it(small: Cli, tmp_path: Path) -> None:
    secret = small.json("token", "create", "--user", "pia")["token"]
    resources = opened(small.environment)
    now = resources.clock()
    with resources.write() as session:
        row = Token(id="abcdefghijkl", user="pia", name="session", secret_sha256="0" * 64, scope={"*": "admin"})
        row.created_at, row.created_by, row.expires_at, row.session = now, "pia", now + timedelta(hours=1), True
        session.add(row)
    resources.close()
    saved = tmp_path / "saved"
    report = small.json("backup", saved)
    rows = gzip.decompress((saved / "snapshots" / report["name"] / "rows.jsonl.gz").read_bytes())
    assert secret.encode() not in rows
    assert b"abcdefghijkl" not in rows
    assert saved.stat().st_mode & 0o077 == 0
    for words, count in ((), 2), (("--without-tokens",), 0):
        restored = Cli({"ADAPTORY_HOME": str(tmp_path / f"restored{count}")})
        restored.ok("restore", saved, *words)
        assert len(restored.json("token", "list")["items"]) == count


@pytest.mark.long
def test_a_backup_of_an_earlier_schema_is_restored_and_migrated_and_of_a_later_one_refused(
    small: Cli, tmp_path: Path
) -> None:
    """The earlier backup is made from a current one, without the tables and columns added since."""
    saved = tmp_path / "saved"
    name = small.json("backup", saved)["name"]
    earlier = sorted(path.name[:4] for path in (migrations_directory() / "versions").glob("0*.py"))[-2]
    directory = saved / "snapshots" / name
    _rewrite(directory, earlier, _columns_of(earlier, tmp_path))
    restored = Cli({"ADAPTORY_HOME": str(tmp_path / "restored")})
    assert restored.json("restore", saved)["fsck"]["findings"] == []
    assert rows_of(restored.environment) == rows_of(small.environment)
    made = Cli({"ADAPTORY_HOME": str(tmp_path / "made")})
    made.ok("list")
    refused = made("restore", saved)
    assert refused.code == 4
    assert "without tables" in refused.err

    _rewrite(directory, "9999", {})
    refused = Cli({"ADAPTORY_HOME": str(tmp_path / "later")})("restore", saved)
    assert refused.code == 7
    assert "schema 9999" in refused.err


def _columns_of(revision: str, tmp_path: Path) -> dict[str, set[str]]:
    database = Database(f"sqlite:///{tmp_path / 'earlier.db'}")
    migrate(database, revision)
    known = MetaData()
    known.reflect(database.engine)
    database.close()
    return {table.name: {column.name for column in table.columns} for table in known.tables.values()}


def _rewrite(directory: Path, revision: str, columns: dict[str, set[str]]) -> None:
    path = directory / "rows.jsonl.gz"
    head, kept = ["", [0]], list[bytes]()
    for line in gzip.decompress(path.read_bytes()).splitlines():
        document = json.loads(line)
        if isinstance(document, dict):
            known = columns.get(document["table"], set())
            head = [document["table"], [i for i, (name, _) in enumerate(document["columns"]) if name in known]]
            document["columns"] = [document["columns"][index] for index in head[1]]
        else:
            document = [document[index] for index in head[1]]
        if head[0] in columns:
            kept.append(json.dumps(document).encode())
    path.write_bytes(gzip.compress(b"\n".join(kept)))
    manifest = json.loads((directory / "manifest.json").read_text())
    content = path.read_bytes()
    manifest["rows"] = {"sha256": sha256(content).hexdigest(), "size_bytes": len(content)}
    manifest["schema_revision"] = revision
    (directory / "manifest.json").write_text(json.dumps(manifest))


def test_what_is_not_a_target_of_backups_is_refused(environ: Environment, tmp_path: Path) -> None:
    cli = Cli(environ)
    for words in (("s3://",), ("s3://bucket/a//b",), ("s3://bucket", "--endpoint-url", "nowhere")):
        refused = cli("backup", *words)
        assert refused.code == 2, words
        assert "Invalid location of backups" in refused.err
    assert cli("backup", tmp_path, "--endpoint-url", "https://s3.example").code == 2
    if "ADAPTORY_STORAGE__PREFIX" in environ:
        refused = cli("backup", f"s3://{BUCKET}/{environ['ADAPTORY_STORAGE__PREFIX']}")
        assert refused.code == 2
        assert "own store" in refused.err
    assert cli("restore", tmp_path / "nothing").code == 3
