"""The numbers of a recipe that a compiled program takes as arguments: a sweep over them compiles once.

A part of a recipe names them itself, in a class attribute `TUNABLE`; numbers that choose between programs, such as the
shape of an array or a branch in Python, have no place in it. A part without the attribute is compiled in. A class that
branches on a number that its parent names must set `TUNABLE` anew.
"""

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from jaxtyping import Array, Float

from fastcifar_jax.recipe import Published, Recipe, resolve_dtype

Values = Mapping[str, float | Float[Array, ""]]  # by dotted names, as in `recipe.flatten`

PARTS = ("model", "loss", "optim", "average")


def tunable(recipe: Recipe) -> dict[str, float]:
    """The recipe's tunable numbers by their dotted names: `{"optim.peak_lr": 0.4, ...}`."""
    return dict(pair for name in PARTS for pair in _walk(name, getattr(recipe, name)))


def with_tunable(recipe: Recipe, values: Values) -> Recipe:
    """The recipe with `values`, which may be traced, in the places of its own.

    Nothing is checked: the recipe that the values are of has been.

    Args:
      recipe: is left as it is.
      values: of all or some of the names of `tunable`.
    """
    return _replaced(recipe, values, "")


def program_key(recipe: Recipe) -> str:
    """What two recipes have in common whose runs are the same program with other numbers."""
    recipe = resolve_dtype(dataclasses.replace(recipe, name="", published=Published()))
    return repr(with_tunable(recipe, dict.fromkeys(tunable(recipe), 0.0)))


def _walk(prefix: str, part: Any) -> Iterator[tuple[str, float]]:
    for name in getattr(part, "TUNABLE", ()):
        value = getattr(part, name)
        if dataclasses.is_dataclass(value):
            yield from _walk(f"{prefix}.{name}", value)
        elif isinstance(value, int | float):  # and not a part that is no dataclass
            yield f"{prefix}.{name}", float(value)


def _replaced(part: Any, values: Values, prefix: str) -> Any:
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
