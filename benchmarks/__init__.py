"""Measurements, one file per claim; RESULTS.md has the figures and the commands that made them."""
