"""Repositories, releases, bases, suites and scores."""
