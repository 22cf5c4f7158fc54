"""Reads models from, and writes them to, a Hugging Face Hub, through the hub's own client (the extra `hub`)."""
