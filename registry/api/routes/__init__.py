"""The routes under /v1: each parses, calls one function, and renders the result."""
