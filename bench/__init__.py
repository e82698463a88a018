"""Measurements and comparisons, not installed: run `python -m bench.NAME` in the root folder."""
