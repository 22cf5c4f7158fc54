"""What a channel serves and served, and the forms that change it."""
