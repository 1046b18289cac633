"""Convolution, batch norm and max-pool, and everything that depends on the platform."""
