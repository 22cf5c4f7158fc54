"""The read side of the Hugging Face Hub's API, for its own clients."""
