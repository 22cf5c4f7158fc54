"""Which weight of the base each tensor of an adapter belongs to."""
