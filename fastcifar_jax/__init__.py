"""The CIFAR-10 bag of tricks as pure JAX functions."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastcifar_jax.recipe import Recipe
    from fastcifar_jax.runs.saved_model import SavedModel

__version__ = "0.1.0"


def load(path: str | os.PathLike[str], *, recipe: "Recipe | None" = None) -> "SavedModel":
    """The model that `run --save` has written, see `fastcifar_jax.saved.load`."""
    from fastcifar_jax.runs import saved_model as saved  # brings in JAX, which `import fastcifar_jax` alone does not

    return saved.load(path, recipe=recipe)
