"""Spend the gain: how many epochs a better recipe can drop until it is no better than another.

The method of the original: every trick was traded for fewer epochs at equal accuracy (Bag of Tricks, throughout).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console

from fastcifar_jax.analysis import stats
from fastcifar_jax.analysis.compare import Arm, CompareOptions, compare, values_of
from fastcifar_jax.cli import console as report


def match_epochs(
    base: Arm,
    arms: Iterator[tuple[int | float, Arm]],
    question: CompareOptions,
    on_row: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Takes arms of falling epoch counts until one is no better than the base.

    Args:
      base: the runs of the recipe to beat.
      arms: (number of epochs, runs of the other recipe), falling; each is made when it is asked for.
      question: the metric, an accuracy, and the confidence of the intervals.
      on_row: called with each row as it is known.

    Returns:
      `{"metric", "confidence", "base": summary, "rows": [{"num_epochs", "arm": summary, "difference": ...}],
      "equal": stats.Crossing as a dict, in epochs; None after a single row}`.

    Raises:
      ValueError: fewer than two finished runs of an arm.
    """
    rows, samples = [], {}
    for num_epochs, arm in arms:
        answer = compare((base, arm), question)
        rows.append({"num_epochs": num_epochs, "arm": answer["arms"][1], "difference": answer["differences"][0]})
        samples[num_epochs] = list(values_of(arm, question.metric).values())
        on_row(rows[-1])
        if rows[-1]["difference"]["estimate"] <= 0:
            break
    epochs = sorted(samples)
    target = list(values_of(base, question.metric).values())
    equal = None
    if len(epochs) > 1:
        equal = stats.crossing(epochs, [samples[e] for e in epochs], target, question.confidence)._asdict()
    return {
        "metric": question.metric,
        "confidence": question.confidence,
        "base": answer["arms"][0],
        "rows": rows,
        "equal": equal,
    }


def show(found: dict[str, Any], console: Console) -> None:
    """The rows as a table, and the epoch count of equal accuracy."""
    base = found["base"]
    level = f"{100 * found['confidence']:.4g} %"
    console.print(
        f"{found['metric'].replace('_', ' ')} in percent, {level} intervals; {base['name']}: {base['num_epochs']} "
        f"epochs, n = {base['n']}, {base['mean']:.2f} ({base['low']:.2f} to {base['high']:.2f}), "
        f"{base['mean_train_seconds']:.1f} s a run",
        soft_wrap=True,
    )
    names = ("epochs", "n", "mean", "interval", "s a run", f"against {base['name']}", "interval (Welch)")
    table = report.make_table(*((name, "right") for name in names))
    for row in found["rows"]:
        arm, d = row["arm"], row["difference"]
        table.add_row(
            str(row["num_epochs"]), str(arm["n"]), f"{arm['mean']:.2f}", f"{arm['low']:.2f} to {arm['high']:.2f}",
            f"{arm['mean_train_seconds']:.1f}", f"{d['estimate']:+.2f}", f"{d['low']:+.2f} to {d['high']:+.2f}",
        )  # fmt: skip
    console.print(table)
    console.print(equal_line(found), soft_wrap=True)


def equal_line(found: dict[str, Any]) -> str:
    """Where the two recipes are equally good."""
    rows, equal = found["rows"], found["equal"]
    epochs = [row["num_epochs"] for row in rows]
    name, base = rows[0]["arm"]["name"].partition(", ")[0], found["base"]["name"]
    if equal is None:
        better = rows[0]["difference"]["estimate"] > 0
        return f"{name} at {epochs[0]} epochs is {'' if better else 'no '}better than {base}; nothing else was tried"
    bounds = f"{_epochs(equal['low'], epochs)} to {_epochs(equal['high'], epochs)}"
    level = f"{100 * found['confidence']:.4g} %"
    return f"{name} equals {base} at {_epochs(equal['value'], epochs)} epochs ({level} bootstrap interval {bounds})"


def _epochs(value: float, epochs: Sequence[int]) -> str:
    """A number of epochs; infinite ones lie outside what was tried."""
    if value == float("inf"):
        return f"more than {max(epochs)}"
    return f"fewer than {min(epochs)}" if value == float("-inf") else f"{value:.1f}"
