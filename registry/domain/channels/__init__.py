"""Channels: gates, promotions and roll-backs, yanks, and what a reference resolves to."""
