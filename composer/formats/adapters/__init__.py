"""Adapters of every layout: what they are, what they fit, which servers load them."""
