"""The API of the Hugging Face Hub, for its own clients."""
