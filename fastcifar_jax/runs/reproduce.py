"""The recipe of a record, and how far the numbers of a rerun are from those on record."""

import math
from collections.abc import Iterator
from typing import Any

from fastcifar_jax.recipe import Recipe, from_dict
from fastcifar_jax.runs.records import Record
from fastcifar_jax.serialization import own_parts

TOLERANCE = 0.1  # percentage points of an accuracy, and per cent of a loss
BITWISE, WITHIN, DIFFERENT = "bitwise equal", "equal within tolerance", "different"
ACCURACIES = ("train_accuracy", "test_accuracy", "tta_accuracy")
LOSSES = ("train_loss", "test_loss", "tta_loss")


def recipe_of(record: Record, declared: Recipe) -> Recipe:
    """The recipe of a record; classes outside this package are taken from the declared recipe.

    Raises:
      ValueError: the record holds a value or a class that no recipe can be built from, or another recipe was recorded.
    """
    try:
        recipe = from_dict(record.recipe, own_parts(declared))
        if recipe.hash != record.recipe_hash:
            raise ValueError(f"its hash is {recipe.hash}, on record {record.recipe_hash}")
    except ValueError as error:
        raise ValueError(
            f"the recipe in the record cannot be used: {error}; check out the code that the record was made with, or "
            "name the right recipe with --experiment"
        ) from error
    return recipe


def compare_rerun(existing: Record, rerun: Record, tolerance: float = TOLERANCE) -> dict[str, Any]:
    """The differences between two records of one run; times are not compared.

    Numbers that are not finite count as equal to each other and as infinitely far from finite ones.

    Args:
      existing: the record.
      rerun: the record of the rerun.
      tolerance: for accuracies in percentage points, and for losses in per cent of the larger one.

    Returns:
      A JSON object: "verdict"; "tolerance"; "numbers", how many were compared; "largest", the largest differences:
      "accuracy" in percentage points, "loss" in per cent, "absolute_loss"; "first_epoch" with a difference, or None;
      "status" and "epochs", `[existing, rerun]`; "provenance_diff", name -> `[existing, rerun]`.
    """
    pairs = list(_pairs(existing, rerun))
    losses = [(old, new) for _, name, old, new in pairs if name in LOSSES]
    largest = {
        "accuracy": max((100 * _distance(old, new) for _, name, old, new in pairs if name in ACCURACIES), default=0.0),
        "loss": max((100 * _distance(old, new, relative=True) for old, new in losses), default=0.0),
        "absolute_loss": max((_distance(old, new) for old, new in losses), default=0.0),
    }
    status, epochs = [existing.status, rerun.status], [len(existing.epochs), len(rerun.epochs)]
    verdict = DIFFERENT
    if status[0] == status[1] and epochs[0] == epochs[1] and max(largest["accuracy"], largest["loss"]) <= tolerance:
        verdict = WITHIN if any(largest.values()) else BITWISE
    return {
        "verdict": verdict,
        "tolerance": tolerance,
        "numbers": len(pairs),
        "largest": largest,
        "first_epoch": next((epoch for epoch, _, old, new in pairs if _distance(old, new)), None),
        "status": status,
        "epochs": epochs,
        "provenance_diff": {name: list(pair) for name, pair in existing.provenance.diff(rerun.provenance).items()},
    }


def _pairs(existing: Record, rerun: Record) -> Iterator[tuple[int, str, float, float]]:
    """Epoch, name, and both values of every number that both records have."""
    for old, new in zip(existing.epochs, rerun.epochs, strict=False):
        for name in (*LOSSES, *ACCURACIES):
            pair = getattr(old, name), getattr(new, name)
            if None not in pair:
                yield old.epoch, name, *pair
    if existing.result and rerun.result:
        for name in ("test_accuracy", "tta_accuracy"):
            yield len(existing.epochs), name, existing.result[name], rerun.result[name]


def _distance(a: float, b: float, relative: bool = False) -> float:
    if not (math.isfinite(a) and math.isfinite(b)):
        return math.inf if math.isfinite(a) or math.isfinite(b) else 0.0
    return abs(a - b) / (max(abs(a), abs(b)) or 1.0) if relative else abs(a - b)
