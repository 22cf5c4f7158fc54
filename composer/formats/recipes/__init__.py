"""Documents that people write: recipes, methods and their settings, weights, suites, rounding, policies."""
