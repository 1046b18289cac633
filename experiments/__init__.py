"""Declared experiments; run them with `python -m experiments`."""
