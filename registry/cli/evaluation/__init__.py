"""Suites, scores and evaluations."""
