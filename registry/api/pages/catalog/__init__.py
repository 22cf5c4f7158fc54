"""What there is: search, repositories, releases, comparisons, bases, suites and error codes."""
