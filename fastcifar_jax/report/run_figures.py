"""Figures of records: curves by epoch, accuracy against length and time, accuracy over seeds."""

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastcifar_jax.analysis import stats
from fastcifar_jax.analysis.compare import Arm, values_of
from fastcifar_jax.report.drawing import COLOURS, DASHES, TEXT, line_style, marker_style, new_figure
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
    """Test accuracy against the length of a run, from `lengths_of`: single runs, means and their 95 % t intervals."""
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
    """Accuracy and loss by epoch, in training and on the test set: thin lines for runs, thick ones for their means."""
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


ArmCurves = dict[str, dict[str, Curves]]  # quantity -> "test" and "training" -> curves


def arm_curves(arm: Arm) -> ArmCurves:
    """The curves of an arm, without quantities that have no values."""
    parts = {"test": "test_{}", "training": "train_{}"}
    found = {q: {part: curves_of(arm, field.format(q)) for part, field in parts.items()} for q in QUANTITIES}
    return {q: both for q, both in found.items() if any(line.finished or line.unfinished for line in both.values())}


def limits_of(found: Sequence[ArmCurves]) -> dict[str, tuple[float, float]]:
    """The range of each quantity over the finished runs of arms, or over the others if no run has finished."""
    limits = {}
    for quantity in QUANTITIES:
        lines = [line for shown in found for line in shown.get(quantity, {}).values()]
        runs = [run for line in lines for run in line.finished] or [run for line in lines for run in line.unfinished]
        if ys := [y for run in runs for _, y in run]:
            limits[quantity] = (min(ys), max(ys))
    return limits


def curves_by_epoch(shown: ArmCurves, limits: Mapping[str, tuple[float, float]]) -> "Figure":
    """Accuracy and loss of one arm, one above the other, as narrow as a phone; at least one of them."""
    figure = new_figure(5, 0.5 + 2 * len(shown))
    axes = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (quantity, both) in zip(axes, shown.items(), strict=True):
        for i, (part, found) in enumerate(both.items()):
            _draw_curves(axis, found, {"color": COLOURS[i], "linestyle": DASHES[i], "marker": "os"[i], "ms": 3}, part)
        low, high = limits[quantity]
        if quantity == "loss" and high > 2 * low:
            _log_scale(axis, low, high)
        else:
            axis.set_ylim(*_around([low, high], 0, 100 if quantity == "accuracy" else np.inf))
        axis.set_ylabel(QUANTITIES[quantity])
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0].legend(loc="lower right" if "accuracy" in shown else "best")
    axes[-1].set_xlabel("epoch")
    return figure


def time_and_accuracy(arm: Arm) -> list[tuple[float, float]]:
    """Training seconds and accuracy with TTA, in per cent, of the finished runs."""
    pairs = zip(*(values_of(arm, metric).values() for metric in ("train_seconds", "tta_accuracy")), strict=True)
    return [pair for pair in pairs if all(map(plausible, pair))]


def accuracy_over_seeds(arms: Numbered) -> "Figure":
    """One row per arm with finished runs: a dot per run, and below them the mean with its 95 % interval."""
    figure = new_figure(5, 0.8 + 0.55 * len(arms))
    axis = figure.subplots()
    ends = []
    for row, (number, arm) in enumerate(arms):
        found, colour = sorted(accuracy for _, accuracy in time_and_accuracy(arm)), COLOURS[(number - 1) % len(COLOURS)]
        mean = stats.summarize(found)
        label = f"{shorten(f'{number}  {arm.name}', LABEL_LENGTH)} (n = {mean.n})"
        axis.text(0, row - 0.17, label, transform=axis.get_yaxis_transform(), in_layout=False)  # above the row
        heights = [row + (0.1, 0, 0.2)[i % 3] for i in range(mean.n)]  # so that equal runs stay apart
        axis.plot(found, heights, "o", color=colour, ms=5, alpha=0.75, mew=0)
        look: dict[str, Any] = {"color": colour, "marker": "|", "ms": 9, "mew": 2.5, "capsize": 3}
        axis.errorbar([mean.mean], [row + 0.38], xerr=_half(mean), **look)
        ends += [*found, *_interval(mean)]
    axis.set(xlabel="accuracy (%)", xlim=_around(ends, 0, 100), ylim=(len(arms) - 0.4, -0.6), yticks=[])
    axis.spines["left"].set_visible(False)
    return figure


def time_against_accuracy(arms: Numbered) -> "Figure":
    """A small dot per finished run, and per arm a numbered marker at the means with both 95 % intervals."""
    figure = new_figure(5, 4 + 0.2 * len(arms))
    axis = figure.subplots()
    ends: tuple[list[float], list[float]] = ([], [])
    for number, arm in arms:
        found = list(zip(*time_and_accuracy(arm), strict=True))
        axis.plot(*found, "o", color=COLOURS[(number - 1) % len(COLOURS)], ms=3, alpha=0.7, mew=0)
        x, y = map(stats.summarize, found)
        look = marker_style(number - 1) | {"ms": 6, "lw": 1, "mec": TEXT, "mew": 0.6, "ls": "none"}
        label = shorten(f"{number}  {arm.name}", LABEL_LENGTH)
        axis.errorbar([x.mean], [y.mean], _half(y), _half(x), **look, label=label)
        offset: dict[str, Any] = {
            "xytext": ((7, 7), (-7, -7), (-7, 7), (7, -7))[number % 4],
            "textcoords": "offset points",
        }
        centred: dict[str, Any] = {"ha": "center", "va": "center", "weight": "bold", "fontsize": 8, "in_layout": False}
        axis.annotate(str(number), (x.mean, y.mean), **offset, **centred)
        for numbers, coordinates, mean in zip(ends, found, (x, y), strict=True):
            numbers += [*coordinates, *_interval(mean)]
    axis.set(xlabel="training time (s)", ylabel="accuracy (%)")
    axis.set(xlim=_around(ends[0], 0, np.inf), ylim=_around(ends[1], 0, 100))
    figure.legend(loc="outside lower left", fontsize=9)
    return figure


def _half(mean: stats.Summary) -> list[float] | None:
    """Half the width of an interval, for error bars; None for a single run."""
    return [mean.high - mean.mean] if mean.n > 1 else None


def _interval(mean: stats.Summary) -> tuple[float, ...]:
    return (mean.low, mean.high) if mean.n > 1 else ()


def _around(found: Sequence[float], least: float, most: float) -> tuple[float, float]:
    """Limits of an axis around numbers; intervals do not extend it beyond `least` and `most`."""
    low, high = min(found), max(found)
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
