"""What adapters would do to each other, on the strongest evidence that there is."""
