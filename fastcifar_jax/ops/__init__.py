"""Convolution, batch norm and max-pool, and what they need on each platform."""
