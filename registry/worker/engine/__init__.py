"""Where the units of a step run: in this process, or on the nodes of a Ray cluster."""
