"""The numbers of a recipe that its compiled program takes as arguments, so that a sweep over them compiles once.

They are the `float` fields of the loss, of the optimiser and of its schedule. A number that selects a program, for
instance one that Python branches on, is a static field: `dataclasses.field(default=0.5, metadata={"static": True})`.
"""

import copy
import dataclasses
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from jaxtyping import Array, Float

from fastcifar_jax.recipe import Published, Recipe

HParams = Mapping[str, float | Float[Array, ""]]  # by dotted names, as in `recipe.flatten`


def hparams(recipe: Recipe) -> dict[str, float]:
    """The traced numbers of a recipe by their dotted names: `{"optim.peak_lr": 0.4, ...}`."""
    return {**dict(_floats("loss", recipe.loss)), **dict(_floats("optim", recipe.optim))}


def with_hparams(recipe: Recipe, values: HParams) -> Recipe:
    """The recipe with `values`, which may be traced, in place of its own.

    Nothing is checked: the numbers of the recipe that the values come from have been.

    Args:
      recipe: left unchanged.
      values: for all or some of the names of `hparams`.
    """
    return _replaced(recipe, values, "")


def program_key(recipe: Recipe) -> str:
    """A key that is equal for recipes with the same program, which differ only in its arguments."""
    recipe = dataclasses.replace(recipe, name="", published=Published())
    return repr(with_hparams(recipe, dict.fromkeys(hparams(recipe), 0.0)))


def _floats(prefix: str, part: Any) -> Iterator[tuple[str, float]]:
    if not dataclasses.is_dataclass(part):
        return
    hints = typing.get_type_hints(type(part))
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if dataclasses.is_dataclass(value):
            yield from _floats(f"{prefix}.{field.name}", value)
        elif hints[field.name] is float and not field.metadata.get("static"):
            yield f"{prefix}.{field.name}", float(value)


def _replaced(part: Any, values: HParams, prefix: str) -> Any:
    new = copy.copy(part)
    for field in dataclasses.fields(part):
        name = prefix + field.name
        if name in values:
            value = values[name]
        elif any(other.startswith(f"{name}.") for other in values):
            value = _replaced(getattr(part, field.name), values, f"{name}.")
        else:
            continue
        object.__setattr__(new, field.name, value)  # not dataclasses.replace, whose checks a tracer cannot pass
    return new
