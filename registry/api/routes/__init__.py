"""The routes under /v1: each parses, calls one function, and shows what comes of it."""
