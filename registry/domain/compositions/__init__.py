"""Recipes, locks and what became of them."""
