"""Scorers of generated answers, a file for each family."""
