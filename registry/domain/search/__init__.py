"""Search: queries, filters, orders and access paths."""
