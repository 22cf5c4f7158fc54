"""Search: a query, its filters, orders and access paths."""
