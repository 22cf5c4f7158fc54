"""The effects that adapters would have on each other, on the strongest available evidence."""
