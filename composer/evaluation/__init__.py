"""A base with deltas active: suites become scores, and modules show their inputs."""
