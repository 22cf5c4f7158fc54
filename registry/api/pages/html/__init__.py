"""What all pages are made with: templates, forms, charts, links."""
