"""Channels: gates, promotions and rollbacks, yanks, and resolving references."""
