"""A Hugging Face Hub as another place for models: read from and written to by its own client, the extra `hub`."""
