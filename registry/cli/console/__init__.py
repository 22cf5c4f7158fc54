"""The shared parts of all commands: connections, output, completion, interrupts and the progress of jobs."""
