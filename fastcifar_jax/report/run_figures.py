"""Figures of records: curves by epoch, accuracy against length and time, accuracy over seeds."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fastcifar_jax.analysis import stats
from fastcifar_jax.analysis.compare import Arm
from fastcifar_jax.report.drawing import COLOURS, DASHES, FAINT, TEXT, line_style, marker_style, new_figure
from fastcifar_jax.report.plot_data import Curves, curves_of
from fastcifar_jax.report.tables import plausible, status_counts, values
from fastcifar_jax.report.text import shorten
from fastcifar_jax.runs.records import STATUSES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

QUANTITIES = {"accuracy": "accuracy (%)", "loss": "loss (nats per image)"}  # and the labels of their axes
LABEL_LENGTH = 44
Numbered = Sequence[tuple[int, Arm]]  # arms and their numbers on a page


def convergence(series: Mapping[str, Mapping[float, Arm]]) -> "Figure":
    """Test accuracy against the length of a run: every run, the means, and their 95 % t intervals.

    Args:
      series: name -> epochs -> the runs of that length, from `plot_data.lengths_of`.
    """
    figure = new_figure(11, 4.5)
    axes = figure.subplots(1, 2, sharey=True)
    metrics = {"test_accuracy": "test accuracy (%)", "tta_accuracy": "test accuracy with TTA (%)"}
    for axis, (metric, label) in zip(axes, metrics.items(), strict=True):
        for i, (name, arms) in enumerate(series.items()):
            found = {epochs: values(arm, metric) for epochs, arm in arms.items() if values(arm, metric)}
            if not found:
                continue
            summaries = [stats.summarize(numbers) for numbers in found.values()]
            means = np.array([summary.mean for summary in summaries])
            half = np.nan_to_num([summary.high - summary.mean for summary in summaries])  # NaN: a single run
            style = line_style(i) | marker_style(i)
            axis.errorbar(list(found), means, half, **style, capsize=4, lw=2, elinewidth=1, label=_counted(name, arms))
            points = [(epochs, number) for epochs, numbers in found.items() for number in numbers]
            axis.plot(*zip(*points, strict=True), **marker_style(i), ls="none", mfc="none", ms=5)
        axis.set(xlabel="length of the run (epochs)", ylabel=label)
        axis.set_xticks(sorted({epochs for arms in series.values() for epochs in arms}))
    axes[1].yaxis.set_tick_params(labelleft=True)
    _legend_above(figure, axes[0], "mean with its 95 % interval; open: single runs")
    return figure


def curves(arms: Sequence[Arm]) -> "Figure":
    """Accuracy and loss by epoch, in training and on the test set: thin lines for single runs, thick for their means.

    Args:
      arms: of `plot_data.read_arms`.
    """
    figure = new_figure(11, 7.5)
    axes = figure.subplots(2, 2, sharex=True)
    for axis, (quantity, part) in zip(axes.flat, itertools.product(QUANTITIES, ("train", "test")), strict=True):
        for i, arm in enumerate(arms):
            found = curves_of(arm, f"{part}_{quantity}")._replace(unfinished=[])
            if found.finished:
                marker = marker_style(i) | {"ms": 5, "markevery": max(1, len(found.mean) // 8)}
                _draw_curves(axis, found, line_style(i) | marker, _counted(arm.name, {0: arm}))
        axis.set_ylabel(f"{'training' if part == 'train' else part} {QUANTITIES[quantity]}")
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in axes[1]:
        axis.set_xlabel("epoch")
    _legend_above(figure, axes[0, 0], "mean; thin: single runs")
    return figure


def _draw_curves(axis: "Axes", found: Curves, style: dict, label: str) -> None:
    """Thin lines for single runs, which end in a cross if unfinished, and a thick line for the mean."""
    thin = {"color": style["color"], "ls": style["linestyle"], "lw": 0.8, "alpha": 0.8}
    for points in (*found.finished, *found.unfinished):
        axis.plot(*zip(*points, strict=True), **thin)
    for points in found.unfinished:
        axis.plot(*points[-1], "x", color=style["color"], ms=6)
    axis.plot(*(zip(*found.mean, strict=True) if found.mean else ((), ())), **style, lw=2, label=label)


class ArmCurves(NamedTuple):
    """The curves of an arm on the page, and the limits of the y axes, which arms with the same data share."""

    shown: dict[str, dict[str, Curves]]  # quantity -> "test" and "training" -> curves; without empty quantities
    limits: dict[str, tuple[float, float]]


def arm_curves(arms: Iterable[Arm]) -> list[ArmCurves]:
    """The curves of arms with the same data; unfinished runs set the limits only if no run has finished."""
    found = []
    for arm in arms:
        parts = {"test": "test_{}", "training": "train_{}"}
        shown = {q: {part: curves_of(arm, field.format(q)) for part, field in parts.items()} for q in QUANTITIES}
        found.append({q: both for q, both in shown.items() if any(c.finished or c.unfinished for c in both.values())})
    limits = {}
    for quantity in QUANTITIES:
        lines = [lines for shown in found for lines in shown.get(quantity, {}).values()]
        runs = [run for line in lines for run in line.finished] or [run for line in lines for run in line.unfinished]
        if ys := [y for run in runs for _, y in run]:
            limits[quantity] = (min(ys), max(ys))
    return [ArmCurves(shown, limits) for shown in found]


def curves_by_epoch(arm: ArmCurves) -> "Figure":
    """Accuracy and loss of one arm by epoch, one above the other, as narrow as a phone.

    Args:
      arm: with at least one quantity to show.
    """
    figure = new_figure(5, 0.5 + 2 * len(arm.shown))
    axes = figure.subplots(len(arm.shown), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (quantity, both) in zip(axes, arm.shown.items(), strict=True):
        for i, (part, found) in enumerate(both.items()):
            _draw_curves(axis, found, {"color": COLOURS[i], "linestyle": DASHES[i], "marker": "os"[i], "ms": 3}, part)
        low, high = arm.limits[quantity]
        if quantity == "loss" and high > 2 * low:
            _log_scale(axis, low, high)
        else:
            axis.set_ylim(*_around(low, high, 0, 100 if quantity == "accuracy" else np.inf))
        axis.set_ylabel(QUANTITIES[quantity])
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0].legend(loc="lower right" if "accuracy" in arm.shown else "best")
    axes[-1].set_xlabel("epoch")
    return figure


def accuracy_over_seeds(arms: Numbered) -> "Figure":
    """One row per arm: a dot per run, and below them the mean with its 95 % interval.

    Args:
      arms: with finished runs on the same data.
    """
    figure = new_figure(5, 0.8 + 0.55 * len(arms))
    axis = figure.subplots()
    for row, (number, arm) in enumerate(arms):
        found, colour = sorted(values(arm, "tta_accuracy")), line_style(number - 1)["color"]
        mean = stats.summarize(found)
        label = shorten(f"{number}  {arm.name}", LABEL_LENGTH)
        # Above the row, whose width is that of the axes.
        axis.text(0, row - 0.17, f"{label} (n = {mean.n})", transform=axis.get_yaxis_transform(), in_layout=False)
        # At three heights in turn, so that equal runs stay apart.
        heights = [row + (0.1, 0, 0.2)[i % 3] for i in range(mean.n)]
        axis.plot(found, heights, "o", color=colour, ms=5, alpha=0.75, mew=0)
        half = [] if mean.n == 1 else [mean.high - mean.mean]
        axis.errorbar([mean.mean], [row + 0.38], xerr=half or None, color=colour, marker="|", ms=9, mew=2.5, capsize=3)
    ends = [end for _, arm in arms for end in _ends(values(arm, "tta_accuracy"))]
    axis.set(xlabel="accuracy (%)", xlim=_around(min(ends), max(ends), 0, 100), ylim=(len(arms) - 0.4, -0.6), yticks=[])
    axis.spines["left"].set_visible(False)
    return figure


def time_against_accuracy(arms: Numbered) -> "Figure":
    """A small dot per run, and a numbered marker at the means with both 95 % intervals.

    Args:
      arms: with finished runs on the same data.
    """
    figure = new_figure(5, 4 + 0.2 * len(arms))
    axis = figure.subplots()
    limits = []
    for number, arm in arms:
        style, both = marker_style(number - 1), [values(arm, metric) for metric in ("train_seconds", "tta_accuracy")]
        axis.plot(*both, "o", color=style["color"], ms=3, alpha=0.7, mew=0)
        x, y = (stats.summarize(found) for found in both)
        xerr, yerr = (None if mean.n == 1 else [mean.high - mean.mean] for mean in (x, y))
        label = shorten(f"{number}  {arm.name}", LABEL_LENGTH)
        axis.errorbar([x.mean], [y.mean], yerr, xerr, **style, ms=6, lw=1, mec=TEXT, mew=0.6, ls="none", label=label)
        side = ((1, 1), (-1, -1), (-1, 1), (1, -1))[number % 4]
        offset = {"xytext": (7 * side[0], 7 * side[1]), "textcoords": "offset points", "ha": "center", "va": "center"}
        axis.annotate(str(number), (x.mean, y.mean), **offset, weight="bold", fontsize=8, in_layout=False)
        limits.append([_ends(found) for found in both])
    xs, ys = ([end for both in limits for end in both[i]] for i in (0, 1))
    axis.set(xlabel="training time (s)", ylabel="accuracy (%)")
    axis.set(xlim=_around(min(xs), max(xs), 0, np.inf), ylim=_around(min(ys), max(ys), 0, 100))
    figure.legend(loc="outside lower left", fontsize=9)
    return figure


def _ends(found: Sequence[float]) -> list[float]:
    """The values and the ends of the interval of their mean."""
    mean = stats.summarize(found)
    return [*found, mean.low, mean.high] if mean.n > 1 else [*found]


def _around(low: float, high: float, least: float, most: float) -> tuple[float, float]:
    """Limits of an axis with a margin, inside `least` and `most`, which intervals may pass, where values are too."""
    if low < most and high > least:
        low, high = max(low, least), min(high, most)
    margin = 0.05 * (high - low) or 0.01 * abs(high) or 1.0
    return low - margin, high + margin


def _log_scale(axis: "Axes", low: float, high: float) -> None:
    """A logarithmic y axis with few ticks, labelled by plain numbers."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_yscale("log")
    axis.set_ylim(low / 1.1, high * 1.1)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 5, 7)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter("{x:g}")


def _counted(name: str, arms: Mapping[float, Arm]) -> str:
    """The name with the number of runs that are drawn, and of those that are not."""
    finished = sorted({sum(record.status == "finished" for record in arm.records) for arm in arms.values()})
    counts = f"n = {finished[0]}" + (f" to {finished[-1]}" if len(finished) > 1 else "")
    lost = status_counts([record for arm in arms.values() for record in arm.records], STATUSES[1:])
    return f"{name} ({counts}{', ' * bool(lost)}{lost})"


def _legend_above(figure: "Figure", axis: "Axes", title: str) -> None:
    """One legend for all panels, where it hides no line."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 3), title=title)
