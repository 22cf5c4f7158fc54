"""Rollouts: canaries and their figures, and the fleet of servers that follow channels."""
