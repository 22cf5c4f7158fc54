"""The environment of a process: its settings, its home directory, and which package `composer` is."""
