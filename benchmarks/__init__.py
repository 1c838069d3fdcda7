"""Scripts that print a table and write JSON; `paper` is run with `python -m benchmarks.paper`."""
