"""Adapters merged into a checkpoint: planned, streamed, verified, resumed, rebuilt."""
