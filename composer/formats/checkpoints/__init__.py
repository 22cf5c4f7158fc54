"""Checkpoints: headers, indexes, quantized and tied weights, digests, and output that appears complete."""
