"""What every edge that answers requests stands on: who asks, for how much, and how an error or a list looks."""
