"""Jobs, and the forms that start compositions and conflict checks."""
