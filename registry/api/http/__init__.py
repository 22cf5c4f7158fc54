"""Callers, rules, limits and problems of HTTP."""
