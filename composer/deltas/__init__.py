"""What adapters add to weights, as tensors."""
