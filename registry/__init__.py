"""The release registry for LoRA adapters: bases, releases, channels, search, scores."""
