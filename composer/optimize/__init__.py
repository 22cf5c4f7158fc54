"""Finds how to combine adapters: candidates are raced on a few examples, and the best are confirmed on unseen ones."""
