"""The benchmark: the cases, and the table of their times."""
