"""The same recipes in PyTorch, to compare with (extra: compare)."""
