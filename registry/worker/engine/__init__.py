"""Where the units of a step run: in a child of this process, or on the nodes of a Ray cluster."""
