"""The command line: arguments in, calls, tables or one JSON document out."""
