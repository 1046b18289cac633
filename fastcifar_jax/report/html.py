"""Records as one HTML page without script or network access: tables, and figures as inline SVG."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from fastcifar_jax import __version__
from fastcifar_jax.report import run_figures, tables
from fastcifar_jax.report.drawing import inline_svg
from fastcifar_jax.report.plot_data import Curves
from fastcifar_jax.report.run_figures import Numbered
from fastcifar_jax.report.tables import ArmRuns, Table, measured, of_100, status_counts
from fastcifar_jax.report.text import clean, data_text, device_text, seconds


class DataSection(NamedTuple):
    """What the page shows of the arms with the same data."""

    data: str
    devices: list[str]
    curves: list[tuple[str, Markup | None]]  # caption and figure of each arm
    seeds: Markup | None  # None if no run has finished, as the next
    time: Markup | None


def html(groups: Sequence[ArmRuns], ladder: Sequence[Table], differences: Sequence[Table]) -> str:
    """The page.

    Args:
      groups: from `tables.grouped`; at least one.
      ladder: from `tables.ladder`.
      differences: from `tables.differences`.
    """
    found = [record for group in groups for record in (*group.arm.records, *group.repeats)]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Numbers break before a bracket, if at all.
    environment.filters |= {"clean": clean, "nobreak": lambda text: re.sub(r" (?!\()", "\u00a0", text)}
    return environment.get_template("page.html").render(
        version=__version__,
        counts=f"{len(found)} records of {len(groups)} arms: {status_counts(found)}",
        newest=max(clean(record.started) for record in found),
        repeats=sum(len(group.repeats) for group in groups),
        ladder=ladder,
        differences=differences,
        sections=list(_sections(groups)),
        runs=tables.run_tables(groups),
    )


def _sections(groups: Sequence[ArmRuns]) -> Iterator[DataSection]:
    """One per data set, in the order of the arms, which have the same numbers everywhere."""
    by_data: dict[tuple, list[tuple[int, Any]]] = {}
    for number, group in enumerate(groups, 1):
        by_data.setdefault(group.data, []).append((number, group.arm))
    for i, arms in enumerate(by_data.values()):
        records = [record for _, arm in arms for record in arm.records]
        drawn = zip(arms, run_figures.arm_curves(arm for _, arm in arms), strict=True)
        curves = [_curves(number, arm, found) for (number, arm), found in drawn]
        data = data_text(records[0].data)
        devices = list(dict.fromkeys(clean(device_text(record.device)) for record in records))
        finished = [(number, arm) for number, arm in arms if all(_summaries(arm))]
        both = _over_seeds(i, data, finished) if finished else (None, None)
        yield DataSection(data, devices, curves, *both)


def _curves(number: int, arm: tables.Arm, found: run_figures.ArmCurves) -> tuple[str, Markup | None]:
    caption = f"{number} {arm.name}: {status_counts(arm.records)}"
    if not found.shown:
        return f"{caption}; no accuracy or loss to draw", None
    lines = [(f"{part} {quantity}", line) for quantity, both in found.shown.items() for part, line in both.items()]
    ids = {"name": f"curves-{number}", "title": f"Accuracy and loss by epoch, {arm.name}"}
    description = " ".join(_described(name, line) for name, line in lines)
    return caption, Markup(inline_svg(run_figures.curves_by_epoch, found, **ids, description=description))


def _described(name: str, line: Curves) -> str:
    if not line.mean:
        return f"{name.capitalize()}: no finished run."
    (first, start), (last, end) = line.mean[0], line.mean[-1]
    return f"{name.capitalize()}: {start:.4g} after epoch {first}, {end:.4g} after epoch {last}, on average."


def _summaries(arm):
    return [tables.summarize(arm, metric) for metric in ("train_seconds", "tta_accuracy")]


def _over_seeds(i: int, data: str, arms: Numbered) -> Iterator[Markup]:
    """The figures of accuracy over seeds and of time against accuracy."""
    shown = [(f"{number} {arm.name}", *_summaries(arm)) for number, arm in arms]
    seeds = " ".join(f"{name}: {measured(accuracy, of_100)}, n = {accuracy.n}." for name, _, accuracy in shown)
    time = " ".join(f"{name}: {seconds(time.mean)}, {of_100(accuracy.mean)}." for name, time, accuracy in shown)
    for name, title, plot, description in (
        ("seeds", "Accuracy over seeds", run_figures.accuracy_over_seeds, seeds),
        ("time", "Training time against accuracy", run_figures.time_against_accuracy, time),
    ):
        yield Markup(inline_svg(plot, arms, name=f"{name}-{i}", title=f"{title}, {data}", description=description))
