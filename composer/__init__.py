"""Adapters as local files: read, check, combine, merge and evaluate them. Knows nothing of the registry."""
