"""Stores for the bytes of releases."""
