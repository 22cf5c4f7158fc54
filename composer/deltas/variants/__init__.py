"""The deltas of each type of adapter."""
