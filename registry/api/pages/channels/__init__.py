"""Pages of a channel: its current and former releases, and the forms that change them."""
