"""The Python API: registries, releases and a callback for trainers."""
