"""Looking for commits, which a process with streams does ten times a second."""

from pathlib import Path

from sqlalchemy import text

from registry.database.changes import CommitWatch
from registry.database.engine import Database
from tests import services


def test_a_commit_changes_the_mark_and_only_the_first_look_may_wait_for_a_connection(tmp_path: Path) -> None:
    database = Database(services.new_database_of("sqlite", tmp_path, migrated=True))
    watch = CommitWatch(database)
    assert not watch.is_quick, "the first look needs a connection of the pool"
    first = watch.mark()
    assert watch.is_quick, "threads for later looks cost as much as a thousand idle streams"
    assert watch.mark() == first
    with database.write() as session:
        session.execute(text("CREATE TABLE news (id INTEGER)"))
    assert watch.mark() != first
    watch.close()
    assert not watch.is_quick
    database.close()
