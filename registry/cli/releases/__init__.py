"""Releases, bases and channels: push, pull, find, compare, promote."""
