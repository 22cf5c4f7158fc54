"""Evidence for a conflict report: a probe, activations, and their intervals."""
