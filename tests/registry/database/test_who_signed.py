"""Migration 0020: the signers of existing releases."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import MetaData, insert, select

from registry.database.engine import Database
from registry.database.migrate import migrate
from registry.database.tables import Release, Signature
from tests import services

NOW = datetime.now(UTC)
BASE = {
    "digest": "b", "architecture_digest": "a", "name": "tiny", "model_type": "llama", "tied": False, "parameters": 1,
    "size_bytes": 1, "tensor_count": 1, "tensors": [], "created_at": NOW, "created_by": "mia",
}  # fmt: skip
RELEASE = {
    "repository_id": 1, "revision_id": 1, "sort_key": "", "stable": True, "base_digest": "b", "traits_id": 1,
    "size_bytes": 1, "facts": {}, "provenance": {}, "servers": 0, "loading": {}, "notes": "", "yanked": False,
    "created_at": NOW, "created_by": "mia",
}  # fmt: skip
SIGNED_BY = {1: "team", 2: "worker", 3: None, 4: "worker", 5: "team", 6: "shared"}
"""2, 5 and 6 were composed: a worker signed 2, its team 5, later; 6 was signed with a key that no worker has used."""


@pytest.mark.on("PostgreSQL")
@pytest.mark.parametrize("kind", services.DATABASES)
def test_what_a_workers_key_signed_of_compositions_is_a_workers_and_the_rest_is_a_publishers(
    kind: str, tmp_path: Path
) -> None:
    database = Database(services.new_database_of(kind, tmp_path))
    migrate(database, "0019")
    tables = MetaData()
    tables.reflect(database.engine)
    later = NOW + timedelta(hours=1)
    signatures = [(2, "worker", NOW), (2, "team", later), (5, "team", later), (6, "shared", later)]
    rows = {
        "bases": [BASE],
        "traits": [{"id": 1, "key": "k", "base_digest": "b", "kind": "adapter", "servers": 0}],
        "repositories": [{"id": 1, "namespace": "acme", "name": "sql", "kind": "adapter", "created_at": NOW}],
        "revisions": [{"id": 1, "repository_id": 1, "commit": "c", "manifest": "", "created_at": NOW}],
        "releases": [{**RELEASE, "id": id_, "version": f"{id_}.0.0", "signed_by": by} for id_, by in SIGNED_BY.items()],
        "release_inputs": [{"release_id": made, "input_id": 1, "weight": 1.0} for made in (2, 5, 6)],
        "signatures": [
            {"release_id": release, "signed_by": by, "bundle": "", "created_at": at, "created_by": "mia"}
            for release, by, at in signatures
        ],
    }
    with database.write() as session:
        for name, listed in rows.items():
            session.execute(insert(tables.tables[name]), listed)
    migrate(database)
    with database.read() as session:
        assert dict(session.execute(select(Release.id, Release.signed_as)).all()) == {
            1: "publisher", 2: "worker", 3: None, 4: "publisher", 5: "publisher", 6: "publisher",
        }  # fmt: skip
        query = select(Signature.release_id, Signature.signed_by, Signature.signed_as).order_by(Signature.release_id)
        assert {(release, by): who for release, by, who in session.execute(query)} == {
            (2, "worker"): "worker", (2, "team"): "publisher", (5, "team"): "publisher", (6, "shared"): "publisher",
        }  # fmt: skip
    database.close()
