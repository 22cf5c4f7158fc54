"""Commands that bring what channels serve to servers."""
