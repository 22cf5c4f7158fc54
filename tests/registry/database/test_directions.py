"""Migration 0007: which way metrics are better, in a registry that has scores already."""

from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import MetaData, insert, select

from registry.database.engine import Database
from registry.database.migrate import migrate
from registry.database.tables import SuiteMetric
from tests import services


@pytest.mark.parametrize("kind", services.DATABASES)
def test_directions_become_those_of_the_authors_scores_and_others_decide_nothing(kind: str, tmp_path: Path) -> None:
    database = Database(services.new_database_of(kind, tmp_path))
    migrate(database, "0006")
    tables = MetaData()
    tables.reflect(database.engine)
    now = datetime.now(UTC)
    suite = {"kind": "target", "examples": 1, "content": {}, "created_at": now, "created_by": "mia"}
    named = [("exact", "1", False), ("exact", "2", True), ("other", "3", True)]
    base = {"digest": "b", "architecture_digest": "a", "name": "tiny", "model_type": "llama", "tied": False}
    base |= {"parameters": 1, "size_bytes": 1, "tensor_count": 1, "tensors": [], "created_at": now, "created_by": "mia"}
    score = {"value": 1.0, "n": 1, "base_digest": "b", "provenance": {}, "measured_at": now}
    scored = [(1, "f1", True, "mia"), (2, "rouge", True, "eve"), (2, "seconds", False, "mia"), (2, "nll", False, "mia")]
    with database.write() as session:
        session.execute(insert(tables.tables["bases"]), [base])
        rows = [{**suite, "name": name, "digest": digest, "current": last} for name, digest, last in named]
        session.execute(insert(tables.tables["suites"]), rows)
        rows = [
            {**score, "suite_id": suite_id, "metric": metric, "higher_is_better": better, "measured_by": by}
            for suite_id, metric, better, by in scored
        ]
        session.execute(insert(tables.tables["scores"]), rows)
    migrate(database)
    with database.read() as session:
        metrics = session.scalars(select(SuiteMetric).order_by(SuiteMetric.metric)).all()
        assert [(row.suite, row.metric, row.higher_is_better, row.stated, row.by) for row in metrics] == [
            ("exact", "f1", True, False, "mia"),
            ("exact", "seconds", False, False, "mia"),
        ]
    database.close()
