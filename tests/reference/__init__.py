"""Independent twins of the package in PyTorch, and the golden numbers that they made."""
