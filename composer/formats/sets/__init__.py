"""Adapter sets: several adapters of one base, and the router that chooses one of them for each prompt."""
