"""Pages of the catalog: search, repositories, releases, comparisons, bases, suites and error codes."""
