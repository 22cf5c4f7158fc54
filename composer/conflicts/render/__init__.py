"""A conflict report as text and as a page."""
