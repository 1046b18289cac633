"""`python -m fastcifar_jax`."""

from fastcifar_jax.cli import main

main()
