"""What is on disk: bytes and limits in, facts or one precise error out. No torch here."""
