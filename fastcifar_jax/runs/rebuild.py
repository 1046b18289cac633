"""The recipe of a record, until `recipe.from_dict` makes it from the record alone."""

from typing import Any

from fastcifar_jax.recipe import Recipe, flatten, override
from fastcifar_jax.runs import files
from fastcifar_jax.runs.records import Record


def rebuild(recipe: Recipe, record: Record) -> Recipe:
    """A declared recipe with the values in a record, whichever options of whichever command had changed them.

    Args:
      recipe: as declared.
      record: of a run of it, or of a changed one.

    Raises:
      ValueError: the result is not the record's recipe; the message names the differences.
    """
    changed = recipe
    left = [name for name in record.recipe if _text(flatten(recipe).get(name)) != _text(record.recipe[name])]
    while left:
        # Repeated, since a value may become possible only after another: the knots of a schedule in fewer epochs.
        refused = []
        for name in left:
            try:
                changed = override(changed, f"{name}={_tuples(record.recipe[name])!r}")
            except ValueError:
                refused.append(name)
        if len(refused) == len(left):
            break
        left = refused
    if changed.hash != record.recipe_hash:
        raise ValueError(
            f"{recipe.name} with the values in the record has the hash {changed.hash}, the record's recipe "
            f"{record.recipe_hash}: {_describe_difference(changed, record)}; check out the code that the record was "
            "made with, or name the right recipe with --experiment"
        )
    return changed


def _describe_difference(recipe: Recipe, record: Record) -> str:
    """Names whose values differ, at most five of them."""
    values = flatten(recipe)
    names = [name for name in {**values, **record.recipe} if _text(values.get(name)) != _text(record.recipe.get(name))]
    if not names:
        return "all values are the same, but the parts print differently"
    shown = [f"{name} is {values.get(name)!r:.60}, on record {record.recipe.get(name)!r:.60}" for name in names[:5]]
    return ", ".join([*shown, *(["..."] if names[5:] else [])])


def _text(value: Any) -> str:
    """A value as a record spells it, so that 10 differs from 10.0."""
    return files.dumps(value)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
