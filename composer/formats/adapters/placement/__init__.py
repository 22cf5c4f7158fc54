"""Matches each tensor of an adapter with the base weight that it belongs to."""
