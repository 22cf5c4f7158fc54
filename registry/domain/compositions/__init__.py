"""Compositions: recipes, locks and results."""
