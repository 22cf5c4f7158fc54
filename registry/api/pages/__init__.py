"""Pages for people: the facts of REST as HTML, which reads without JavaScript."""
