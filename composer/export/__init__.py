"""Deltas written as one PEFT adapter, of several adapters or of another layout."""
