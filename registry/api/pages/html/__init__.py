"""The parts of all pages: templates, forms, charts, links."""
