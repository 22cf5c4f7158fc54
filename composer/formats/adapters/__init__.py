"""Adapters of every layout: their facts, their fit to a base, and the servers that load them."""
