"""HTTP: callers, rules, limits and problems."""
