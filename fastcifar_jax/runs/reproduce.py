"""A run made again: its recipe from its record, and how far the numbers of the two are apart."""

import math
from collections.abc import Iterator
from typing import Any

from rich.console import Console

from fastcifar_jax.cli import console as report
from fastcifar_jax.recipe import Recipe, flatten, override
from fastcifar_jax.runs import records
from fastcifar_jax.runs.records import Record

TOLERANCE = 0.1  # percentage points of an accuracy, and percent of a loss
BITWISE, WITHIN, DIFFERENT = "bitwise equal", "equal within tolerance", "different"
ACCURACIES = ("train_accuracy", "test_accuracy", "tta_accuracy")
LOSSES = ("train_loss", "test_loss", "tta_loss")
RESULTS = ("test_accuracy", "tta_accuracy")


def rebuild(recipe: Recipe, record: Record) -> Recipe:
    """The recipe of a record: a declared one with the values that the record has.

    So it does not matter which options of which command had changed them.

    Args:
      recipe: as it is declared.
      record: of a run of it, or of a changed one.

    Raises:
      ValueError: another recipe than the record's results; the message says in what.
    """
    changed = recipe
    left = [name for name in record.recipe if _text(flatten(recipe).get(name)) != _text(record.recipe[name])]
    while left:
        # Again and again, for a value may be possible only after another: the knots of a schedule in fewer epochs.
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
            f"{recipe.name} with the values of the record has the hash {changed.hash}, the record's recipe "
            f"{record.recipe_hash}: {_describe_difference(changed, record)}; check out the code that the record was "
            "made with, or name the right recipe with --experiment"
        )
    return changed


def compare(known: Record, again: Record, tolerance: float = TOLERANCE) -> dict[str, Any]:
    """How far a rerun's numbers are from those on record; times are not compared.

    Numbers that are not finite count as equal to each other and as infinitely far from others.

    Args:
      known: the record.
      again: the record of the rerun.
      tolerance: the most that an accuracy may differ by, in percentage points, and a loss, in percent of the larger.

    Returns:
      A JSON object: "verdict"; "tolerance"; "numbers", how many were compared; "largest", the largest differences, as
      "accuracy" in percentage points and "loss" in percent and as "absolute_loss"; "first_epoch" that differs, or None;
      "status" and "epochs", `[known, again]`; "provenance_diff", name -> `[known, again]`.
    """
    pairs = list(_pairs(known, again))
    accuracies = [100 * _distance(a, b) for _, name, a, b in pairs if name in ACCURACIES]
    losses = [(_distance(a, b), _relative(a, b)) for _, name, a, b in pairs if name in LOSSES]
    largest = {
        "accuracy": max(accuracies, default=0.0),
        "loss": max((100 * relative for _, relative in losses), default=0.0),
        "absolute_loss": max((distance for distance, _ in losses), default=0.0),
    }
    whole = known.status == again.status and len(known.epochs) == len(again.epochs)
    verdict = DIFFERENT
    if whole and largest["accuracy"] <= tolerance and largest["loss"] <= tolerance:
        verdict = WITHIN if any(largest.values()) else BITWISE
    return {
        "verdict": verdict,
        "tolerance": tolerance,
        "numbers": len(pairs),
        "largest": largest,
        "first_epoch": next((epoch for epoch, _, a, b in pairs if _distance(a, b)), None),
        "status": [known.status, again.status],
        "epochs": [len(known.epochs), len(again.epochs)],
        "provenance_diff": provenance_diff(known, again),
    }


def provenance_diff(known: Record, again: Record) -> dict[str, list[Any]]:
    """What differs in the making of two runs: name -> `[known, again]`, None where one does not say."""
    fields = {"source code": "source_hash"} | {name: name for name in ("conv", "driver", "strategy", "mesh")}
    pairs = {name: (getattr(known, field), getattr(again, field)) for name, field in fields.items()}
    for group in ("versions", "device", "data"):
        old, new = getattr(known, group), getattr(again, group)
        pairs |= {f"{group}: {name}": (old.get(name), new.get(name)) for name in {**old, **new}}
    return {name: list(pair) for name, pair in pairs.items() if pair[0] != pair[1]}


def show(label: str, answer: dict[str, Any], console: Console) -> None:
    """Prints the answer of `compare`.

    Args:
      label: of the run.
      answer: what `compare` returned.
      console: where to.
    """
    lines = [f"{label}: {answer['verdict']}: {_explained(answer)}"]
    if answer["provenance_diff"]:
        lines.append("made otherwise (on record, now):")
    else:
        lines.append("made alike: versions, device, data, source code, convolutions and driver are those on record")
    for line in lines:
        console.print(line, soft_wrap=True)
    if answer["provenance_diff"]:
        table = report.make_table("what", "on record", "now")
        for name, pair in answer["provenance_diff"].items():
            table.add_row(name, *("" if value is None else str(value) for value in pair))
        console.print(table)


def _explained(answer: dict[str, Any]) -> str:
    count, (known, again), largest = answer["numbers"], answer["epochs"], answer["largest"]
    parts = []
    if answer["status"][0] != answer["status"][1]:
        parts.append(f"{answer['status'][0]} on record, {answer['status'][1]} now")
    if known != again:
        parts.append(f"{known} epochs on record, {again} now")
    if answer["first_epoch"] is None:
        parts.append(f"{count} losses and accuracies of {min(known, again)} epochs are the same to the last bit")
    else:
        parts.append(
            f"of {count} numbers, accuracies differ by up to {largest['accuracy']:.4g} points and losses by up to "
            f"{largest['loss']:.4g} % ({largest['absolute_loss']:.4g}), from epoch {answer['first_epoch']} on; the "
            f"tolerance is {answer['tolerance']:g} points and {answer['tolerance']:g} %"
        )
    return "; ".join(parts)


def _pairs(known: Record, again: Record) -> Iterator[tuple[int, str, float, float]]:
    """Epoch, name, and the number on record and now, of all that both have."""
    for old, new in zip(known.epochs, again.epochs, strict=False):
        for name in (*LOSSES, *ACCURACIES):
            yield old.epoch, name, getattr(old, name), getattr(new, name)
    if known.result and again.result:
        for name in RESULTS:
            yield known.epochs[-1].epoch if known.epochs else 0, name, known.result[name], again.result[name]


def _distance(a: float, b: float) -> float:
    if math.isfinite(a) and math.isfinite(b):
        return abs(a - b)
    return math.inf if math.isfinite(a) or math.isfinite(b) else 0.0


def _relative(a: float, b: float) -> float:
    distance = _distance(a, b)
    return distance / max(abs(a), abs(b)) if 0 < distance < math.inf else distance


def _describe_difference(recipe: Recipe, record: Record) -> str:
    """Names whose values differ, at most five of them."""
    values = flatten(recipe)
    names = [name for name in {**values, **record.recipe} if _text(values.get(name)) != _text(record.recipe.get(name))]
    if not names:
        return "all values are the same, but the parts print otherwise than they did"
    shown = [f"{name} is {values.get(name)!r:.60}, on record {record.recipe.get(name)!r:.60}" for name in names[:5]]
    return ", ".join([*shown, *(["..."] if names[5:] else [])])


def _text(value: Any) -> str:
    """A value as a record spells it, so that 10 is not 10.0."""
    return records.dumps(value)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
