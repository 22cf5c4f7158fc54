"""A fact of a release is added in four files: docs/contributing.md has the recipe."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import registry
from tests.scenarios.world import World

ROOT = Path(registry.__file__).parents[1]
MIGRATION = '''"""who has reviewed a release"""

import sqlalchemy as sa
from alembic import op

revision, down_revision, oldest_code = "{number}", "{before}", "0018"


def upgrade() -> None:
    op.add_column("releases", sa.Column("reviewed_by", sa.String()))
'''
EDITS = {
    "registry/database/tables/catalog.py": (
        "    yank_reason: Mapped[str | None]\n",
        "    reviewed_by: Mapped[str | None]\n",
    ),
    "registry/domain/catalog/release_rows.py": (
        "    yanked: bool = fact(_release.yanked)\n",
        "    reviewed_by: str | None = fact(_release.reviewed_by, shown=True)\n",
    ),
    "registry/wire/catalog.py": ("    yank_reason: str | None\n", "    reviewed_by: str | None\n"),
}
"""Text that occurs once, and the line to add below it."""


@pytest.mark.long
def test_a_fact_that_is_added_in_four_files_is_in_the_database_and_in_every_document(
    world: World, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    for package in ("registry", "migrations"):
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    (source / "composer").symlink_to(ROOT / "composer")
    before = max(path.name[:4] for path in (source / "migrations" / "versions").glob("[0-9]*_*.py"))
    number = f"{int(before) + 1:04}"
    migration = source / "migrations" / "versions" / f"{number}_reviewed_by.py"
    migration.write_text(MIGRATION.format(number=number, before=before))
    for name, (there, added) in EDITS.items():
        text = (source / name).read_text()
        assert text.count(there) == 1, name
        (source / name).write_text(text.replace(there, there + added))

    environment = os.environ | {"PYTHONPATH": str(source), "ADAPTORY_HOME": str(tmp_path / "home")}
    del environment["ADAPTORY_TEST_SERVICES"]

    def adaptory(*words: str | Path) -> Any:
        program = [sys.executable, "-c", "from registry.cli.start import main; main()", *words, "--json"]
        ran = subprocess.run(program, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
        return json.loads(ran.stdout)

    adaptory("base", "add", world.base, "--name", "tiny")
    pushed = adaptory("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny", "--channel", "prod")
    assert pushed["release"]["reviewed_by"] is None
    with sqlite3.connect(tmp_path / "home" / "registry.db") as database:
        database.execute("UPDATE releases SET reviewed_by = 'rita', stamp = stamp + 1")
    database.close()
    assert adaptory("show", "acme/sql@prod")["reviewed_by"] == "rita"
    assert [item["reviewed_by"] for item in adaptory("search")["items"]] == ["rita"]
