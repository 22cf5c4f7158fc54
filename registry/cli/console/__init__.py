"""What all commands share: connections, output, completion, interrupts and the progress of jobs."""
