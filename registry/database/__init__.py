"""The database: engine, tables, locks, migrations and the two dialects. No rule of the product."""
