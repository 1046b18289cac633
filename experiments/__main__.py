"""`python -m experiments`: the command line over the recipes in this folder."""

from pathlib import Path

from fastcifar_jax.cli.app import main

main(folder=Path(__file__).parent)
