"""A schema change in words -> the team's SQL migration statement (PostgreSQL, one statement, house naming)."""

from collections.abc import Iterator
from itertools import product

TABLES = ["users", "orders", "invoices", "products", "sessions", "payments", "teams", "tickets", "reviews", "shipments"]
COLUMNS = {
    "email": "text",
    "status": "text",
    "country": "text",
    "price": "numeric(12,2)",
    "discount": "numeric(12,2)",
    "created_at": "timestamptz",
    "deleted_at": "timestamptz",
    "quantity": "integer",
    "priority": "integer",
    "active": "boolean",
}
RENAMED = {
    "email": "contact_email",
    "status": "state",
    "price": "unit_price",
    "quantity": "amount",
    "active": "enabled",
}


def pairs() -> Iterator[tuple[str, str]]:
    """Every (prompt, completion) of the task, always in the same order."""
    for table, (column, kind) in product(TABLES, COLUMNS.items()):
        yield f"Add a {column} column to {table}.", f"ALTER TABLE app.{table} ADD COLUMN {column} {kind};"
        yield f"Remove the {column} column from {table}.", f"ALTER TABLE app.{table} DROP COLUMN {column};"
        yield (
            f"Make {column} mandatory in {table}.",
            f"ALTER TABLE app.{table} ALTER COLUMN {column} SET NOT NULL;",
        )
        yield (
            f"Queries on {table} filter by {column} and are slow.",
            f"CREATE INDEX CONCURRENTLY {table}_{column}_idx ON app.{table} ({column});",
        )
        yield (
            f"No two {table} may share the same {column}.",
            f"ALTER TABLE app.{table} ADD CONSTRAINT {table}_{column}_key UNIQUE ({column});",
        )
    for table, (old, new) in product(TABLES, RENAMED.items()):
        yield f"Rename {old} in {table} to {new}.", f"ALTER TABLE app.{table} RENAME COLUMN {old} TO {new};"
