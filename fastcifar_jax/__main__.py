"""`python -m fastcifar_jax`."""

from fastcifar_jax.cli.app import main

main()
