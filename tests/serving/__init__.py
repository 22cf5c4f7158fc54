"""Serving: agents, fronts and servers."""
