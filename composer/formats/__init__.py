"""Checkpoints, adapters and recipes as files: read, checked and named. Nothing here imports torch."""
