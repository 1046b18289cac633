"""Records as one HTML page without script or network access: tables, and figures as inline SVG."""

import re
from collections.abc import Iterator, Sequence
from itertools import starmap
from pathlib import Path
from typing import Any

import jinja2

from fastcifar_jax import __version__
from fastcifar_jax.analysis import stats
from fastcifar_jax.analysis.compare import Arm
from fastcifar_jax.report import run_figures, tables
from fastcifar_jax.report.drawing import inline_svg
from fastcifar_jax.report.plot_data import Curves
from fastcifar_jax.report.run_figures import Numbered
from fastcifar_jax.report.tables import Table, measured, of_100, status_counts
from fastcifar_jax.report.text import clean, counted, data_text, device_text, seconds
from fastcifar_jax.runs.provenance import data_key


def html(arms: Sequence[Arm], ladder: Sequence[Table], differences: Sequence[Table]) -> str:
    """The page.

    Args:
      arms: from `tables.arms_of`; at least one.
      ladder: from `tables.ladder`.
      differences: from `tables.differences`.
    """
    found = [record for arm in arms for record in (*arm.records, *arm.repeats)]
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
        counts=f"{counted(len(found), 'record')} of {counted(len(arms), 'arm')}: {status_counts(found)}",
        newest=max(clean(record.started) for record in found),
        repeats=sum(len(arm.repeats) for arm in arms),
        ladder=ladder,
        differences=differences,
        sections=list(_sections(arms)),
        runs=tables.run_tables(arms),
    )


def _sections(arms: Sequence[Arm]) -> Iterator[dict[str, Any]]:
    """The figures of each data set; the numbers of the arms are the same everywhere."""
    by_data: dict[tuple, list[tuple[int, Arm]]] = {}
    for number, arm in enumerate(arms, 1):
        by_data.setdefault(data_key(arm.records[0].provenance), []).append((number, arm))
    for i, alike in enumerate(by_data.values()):
        records = [record for _, arm in alike for record in arm.records]
        found = [run_figures.arm_curves(arm) for _, arm in alike]
        limits = run_figures.limits_of(found)
        data = data_text(records[0].provenance.data)
        finished = [(number, arm) for number, arm in alike if run_figures.time_and_accuracy(arm)]
        yield {
            "data": data,
            "devices": list(dict.fromkeys(device_text(record.provenance.device) for record in records)),
            "curves": [_curves(*numbered, shown, limits) for numbered, shown in zip(alike, found, strict=True)],
            **(_over_seeds(i, data, finished) if finished else {"seeds": "", "time": ""}),
        }


def _curves(number: int, arm: Arm, shown: run_figures.ArmCurves, limits: dict) -> tuple[str, str]:
    """Caption and figure."""
    caption = f"{number} {arm.name}: {status_counts(arm.records)}"
    if not shown:
        return f"{caption}; no accuracy or loss to draw", ""
    lines = [(f"{part} {quantity}", line) for quantity, both in shown.items() for part, line in both.items()]
    texts = {"title": f"Accuracy and loss by epoch, {arm.name}", "description": " ".join(starmap(_described, lines))}
    return caption, inline_svg(run_figures.curves_by_epoch, shown, limits, name=f"curves-{number}", **texts)


def _described(name: str, line: Curves) -> str:
    if not line.mean:
        return f"{name.capitalize()}: no finished run."
    (first, start), (last, end) = line.mean[0], line.mean[-1]
    return f"{name.capitalize()}: {start:.4g} after epoch {first}, {end:.4g} after epoch {last}, on average."


def _over_seeds(i: int, data: str, arms: Numbered) -> dict[str, str]:
    """The figures of accuracy over seeds and of time against accuracy."""
    seeds, times = [], []
    for number, arm in arms:
        time, accuracy = map(stats.summarize, zip(*run_figures.time_and_accuracy(arm), strict=True))
        seeds.append(f"{number} {arm.name}: {measured(accuracy, of_100)}, n = {accuracy.n}.")
        times.append(f"{number} {arm.name}: {seconds(time.mean)}, {of_100(accuracy.mean)}.")
    draw = lambda name, plot, title, texts: inline_svg(
        plot, arms, name=f"{name}-{i}", title=f"{title}, {data}", description=" ".join(texts)
    )
    return {
        "seeds": draw("seeds", run_figures.accuracy_over_seeds, "Accuracy over seeds", seeds),
        "time": draw("time", run_figures.time_against_accuracy, "Training time against accuracy", times),
    }
