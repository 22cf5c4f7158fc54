"""Composition methods: several adapters' deltas become one list of deltas."""
