"""What each type of adapter adds to a weight."""
