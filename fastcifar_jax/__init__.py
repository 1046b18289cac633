"""The CIFAR-10 bag of tricks as pure JAX functions."""

__version__ = "0.1.0"
