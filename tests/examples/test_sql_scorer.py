"""The scorer of the documentation, installed and enabled as in its readme, and answers that must not have effects."""

import sys
import time
import tomllib
from collections.abc import Generator
from pathlib import Path

import pytest
import yaml

from composer.errors import ComposerError
from composer.evaluation.scorers.scorer import GROUP, Scorer, checked_score, scorer_named
from composer.formats.recipes.suite import Example, Suite
from composer.formats.recipes.tasks import ScorerChoice

FOLDER = Path(__file__).parents[2] / "examples" / "sql_scorer"
SETUP = """
CREATE TABLE orders (id INTEGER PRIMARY KEY, customer TEXT, total REAL);
INSERT INTO orders VALUES (1, 'ada', 20.0), (2, 'grace', 35.5), (3, 'ada', 5.0);
"""
WANTED = "SELECT customer, SUM(total) FROM orders GROUP BY customer"


@pytest.fixture(autouse=True)
def _installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[None]:  # pyright: ignore[reportUnusedFunction]
    """Installs it like pip: the module, and the entry points of its project file."""
    project = tomllib.loads((FOLDER / "pyproject.toml").read_text())["project"]
    metadata = tmp_path / f"adaptory_sql_scorer-{project['version']}.dist-info"
    metadata.mkdir()
    head = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (metadata / "METADATA").write_text(head)
    points = "\n".join(f"{name} = {value}" for name, value in project["entry-points"][GROUP].items())
    (metadata / "entry_points.txt").write_text(f"[{GROUP}]\n{points}\n")
    (tmp_path / "sql_scorer.py").write_bytes((FOLDER / "sql_scorer.py").read_bytes())
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("sql_scorer", None)


def scorer(**settings: object) -> Scorer:
    return scorer_named(ScorerChoice(name="sql_results", settings={"setup": SETUP, **settings}), ("sql_results",))


def score(answer: str, completion: str = WANTED, **settings: object) -> float:
    return checked_score(scorer(**settings), "sql_results", answer, Example("?", completion))


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (WANTED, 1),
        ("select o.customer, total(o.total) from orders o group by 1 order by 2 desc", 1),
        (f"```sql\n{WANTED};\n```", 1),
        ("SELECT customer FROM orders", 0),
        ("SELECT customer, SUM(total) FROM orders GROUP BY customer LIMIT 1", 0),
        ("not SQL", 0),
        ("", 0),
    ],
)
def test_a_query_is_right_if_it_returns_the_same_rows(answer: str, expected: float) -> None:
    assert score(answer) == expected


def test_the_order_of_rows_counts_only_if_the_suite_says_so() -> None:
    ascending, descending = "SELECT id FROM orders ORDER BY id", "SELECT id FROM orders ORDER BY id DESC"
    assert score(descending, ascending) == 1
    assert score(descending, ascending, ordered=True) == 0


NUMBERS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) "
ORDERS = ", ".join(f"orders t{number}" for number in range(18))


@pytest.mark.parametrize(
    "parts",
    [
        (NUMBERS, "SELECT COUNT(*) FROM n"),
        (NUMBERS, "SELECT i FROM n"),
        ("SELECT COUNT(*) FROM", ORDERS),
        ("SELECT t1.id FROM", ORDERS, "ORDER BY t1.total"),
        ("SELECT hex(zeroblob(1000000000))",),
        ("SELECT replace(printf('%1000000d', 1), ' ', 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx')",),
        (NUMBERS, "SELECT group_concat(printf('%9000d', i), '') FROM n LIMIT 100000"),
        (NUMBERS, "SELECT i FROM n WHERE instr(printf('%9000d', i), printf('%4500d', 1)) > 9999"),
        ("SELECT", "(" * 9_000, "1", ")" * 9_000),
        (f"SELECT '{'x' * 30_000}'",),
        ("SELECT random()",),
    ],
)
def test_an_answer_without_end_is_wrong_within_seconds(parts: tuple[str, ...]) -> None:
    began_s = time.thread_time()
    assert score(" ".join(parts)) == 0
    assert time.thread_time() - began_s < 3


@pytest.mark.parametrize(
    "answer",
    [
        "DELETE FROM orders",
        "INSERT INTO orders VALUES (9, 'x', 1)",
        "DROP TABLE orders",
        "CREATE TABLE other (id)",
        "ATTACH DATABASE '{path}' AS other",
        "VACUUM INTO '{path}'",
        "PRAGMA query_only = OFF",
        "PRAGMA temp_store_directory = '/'",
        "SELECT load_extension('{path}')",
        "SELECT customer, SUM(total) FROM orders GROUP BY customer; DELETE FROM orders",
        "WITH gone AS (SELECT 1) DELETE FROM orders",
    ],
)
def test_an_answer_reads_and_does_nothing_else(answer: str, tmp_path: Path) -> None:
    own, file = scorer(), tmp_path / "written"
    assert own(answer.format(path=file), Example("?", WANTED)) == 0
    assert not file.exists()
    assert own(WANTED, Example("?", WANTED)) == 1, "the database is as it was"


@pytest.mark.parametrize(
    "setup",
    [
        "ATTACH DATABASE '{path}' AS other; CREATE TABLE other.t (id)",
        "CREATE TABLE t (id); VACUUM INTO '{path}'",
        "PRAGMA temp_store_directory = '/'",
        "SELECT load_extension('{path}')",
        "CREATE TABLE t AS {numbers} SELECT i FROM n",
        "CREATE TABLE t (text); {numbers} INSERT INTO t SELECT printf('%9000d', i) FROM n LIMIT 100000",
    ],
)
def test_the_setup_of_a_suite_opens_no_file_and_is_bounded(setup: str, tmp_path: Path) -> None:
    file, began_s = tmp_path / "written", time.thread_time()
    with pytest.raises(ComposerError, match="setup: "):
        scorer(setup=setup.format(path=file, numbers=NUMBERS))
    assert not file.exists()
    assert time.thread_time() - began_s < 20


def test_a_setup_makes_fills_and_changes_tables() -> None:
    more = "BEGIN; CREATE VIEW v AS SELECT 1; DROP VIEW v; ALTER TABLE orders ADD COLUMN paid; COMMIT;"
    more += (
        "CREATE INDEX i ON orders (customer); UPDATE orders SET total = 1 WHERE id = 1; DELETE FROM orders WHERE id = 2"
    )
    assert score(
        "SELECT 1, 'ada', 1.0, NULL UNION SELECT 3, 'ada', 5.0, NULL", "SELECT * FROM orders", setup=f"{SETUP}{more}"
    )


def test_a_suite_that_cannot_be_scored_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ComposerError, match="setup: "):
        scorer(setup="CREATE TABEL x")
    with pytest.raises(ComposerError, match="does not accept these settings"):
        scorer(strict=True)
    with pytest.raises(ComposerError, match="no such table"):
        score(WANTED, "SELECT * FROM missing")


def test_the_suite_of_the_readme_is_one() -> None:
    text = (FOLDER / "README.md").read_text().partition("```yaml\n")[2].partition("```")[0]
    suite = Suite.from_json(yaml.safe_load(text))
    assert suite.scoring is not None
    own = scorer_named(suite.scoring, ("sql_results",))
    assert [own(example.completion, example) for example in suite.examples] == [1.0]
