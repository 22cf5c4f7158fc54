"""Conflicts, compositions and merges, in a registry or on local directories."""
