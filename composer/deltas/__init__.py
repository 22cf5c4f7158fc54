"""The deltas that adapters add to weights, as tensors."""
