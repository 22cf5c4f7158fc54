"""which way a metric of a suite is better: the word of the suite's author, no longer of whoever recorded first

Of scores that are there, the first one of the author fixes it, in the direction that the scores have. What the author
has never measured is open, until the suite's file states it.
"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"

KNOWN = ("nll", "accuracy")

suites = sa.table("suites", *map(sa.column, ("id", "name", "current", "created_by")))
scores = sa.table(
    "scores", *map(sa.column, ("id", "suite_id", "metric", "higher_is_better", "measured_by", "measured_at"))
)
metrics = sa.table("suite_metrics", *map(sa.column, ("suite", "metric", "higher_is_better", "stated", "by", "at")))


def upgrade() -> None:
    op.create_table(
        "suite_metrics",
        sa.Column("suite", sa.String(64), nullable=False),
        sa.Column("metric", sa.String(64), nullable=False),
        sa.Column("higher_is_better", sa.Boolean(), nullable=False),
        sa.Column("stated", sa.Boolean(), nullable=False),
        sa.Column("by", sa.String(128), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("suite", "metric", name=op.f("pk_suite_metrics")),
    )
    versions, current = suites.alias("versions"), suites.alias("current")
    made_by = current.c.current.is_(sa.true()) & (current.c.created_by == scores.c.measured_by)
    first = (
        sa.select(versions.c.name, scores.c.metric, sa.func.min(scores.c.id).label("id"))
        .join(versions, versions.c.id == scores.c.suite_id)
        .join(current, current.c.name == versions.c.name)
        .where(made_by, scores.c.metric.not_in(KNOWN))
        .group_by(versions.c.name, scores.c.metric)
        .subquery()
    )
    found = sa.select(
        first.c.name,
        first.c.metric,
        scores.c.higher_is_better,
        sa.false(),
        scores.c.measured_by,
        scores.c.measured_at,
    ).join(scores, scores.c.id == first.c.id)
    columns = ["suite", "metric", "higher_is_better", "stated", "by", "at"]
    op.execute(sa.insert(metrics).from_select(columns, found))
