"""Records as one HTML page that needs neither network nor script: tables, and charts as inline SVG."""

import re
from collections.abc import Iterator, Sequence
from html import escape

from fastcifar_jax import __version__
from fastcifar_jax.analysis import stats
from fastcifar_jax.analysis.compare import values_of
from fastcifar_jax.cli import console as report
from fastcifar_jax.report import charts, tables
from fastcifar_jax.report.charts import Line
from fastcifar_jax.report.tables import ArmRuns, Table, clean, percent, plausible, seconds
from fastcifar_jax.runs.experiments import Experiment
from fastcifar_jax.runs.records import STATUSES, Record

SameData = tuple[str, list[tuple[int, ArmRuns]]]  # a data set, and the numbered arms that can be compared on it

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
# Okabe and Ito's colours, of each pair the one that stands out from the background; shapes and numbers say the same.
STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1b1b1b; --faint: #5c5c5c; --line: #d9d9d9; --head: #f4f4f2;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #cc79a7; --c4: #1b1b1b; }
@media (prefers-color-scheme: dark) {
  :root { --back: #16181b; --text: #e8e8e6; --faint: #a9a9a6; --line: #3b3e42; --head: #202327;
    --c0: #56b4e9; --c1: #e69f00; --c2: #009e73; --c3: #cc79a7; --c4: #f0e442; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 80rem; background: var(--back); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; }
p { margin: .5rem 0; max-width: 46rem; }
a { color: var(--c0); }
nav ul, .key { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; list-style: none; padding: 0; margin: .75rem 0; }
.key svg { width: 12px; height: 12px; vertical-align: -1px; margin-right: .3rem; }
.scroll { overflow-x: auto; margin: 1rem 0 1.5rem; border: 1px solid var(--line); border-radius: 4px; }
.scroll:focus-visible { outline: 2px solid var(--c0); }
table { border-collapse: collapse; width: 100%; font-size: .875rem; overflow-wrap: normal; }
caption { text-align: left; padding: .5rem; font-weight: 600; }
caption span { position: sticky; left: .5rem; display: inline-block; max-width: min(60rem, calc(100vw - 4rem)); }
th, td { padding: .3rem .5rem; text-align: left; vertical-align: top; border-top: 1px solid var(--line); }
thead th { background: var(--head); white-space: nowrap; } tbody th { font-weight: 600; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.long { min-width: 15rem; overflow-wrap: anywhere; }
@media (max-width: 60rem) { .long { min-width: 34rem; } }  /* it scrolls anyway: rather wide than tall */
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 1.5rem; }
figure { margin: 0; max-width: 30rem; } figcaption { font-size: .875rem; margin-bottom: .25rem; }
figure > svg { display: block; width: 100%; height: auto; }
svg text { font: 11px system-ui, sans-serif; fill: var(--text); }
svg .tick, svg .unit { fill: var(--faint); font-size: 10px; }
svg .number { font-weight: 700; paint-order: stroke; stroke: var(--back); stroke-width: 3px; }
svg path { fill: none; stroke: var(--text); }
svg .grid { stroke: var(--line); } svg .axis { stroke: var(--faint); }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); } .c4 { --c: var(--c4); }
.test { --c: var(--c0); } .training { --c: var(--c1); }
svg .mean { stroke: var(--c); stroke-width: 2; } svg .seed { stroke: var(--c); opacity: .7; }
svg .training.mean, svg .training.seed { stroke-dasharray: 5 3; }
svg .end { stroke: var(--c); stroke-width: 1.5; }
svg .dot { fill: var(--c); } svg .run { fill: var(--c); fill-opacity: .6; }
svg .marker { fill: var(--c); stroke: var(--back); } svg .interval { stroke: var(--c); stroke-width: 1.2; }
svg .average { stroke: var(--c); stroke-width: 2.5; }
footer { margin-top: 3rem; color: var(--faint); font-size: .875rem; }
"""
QUANTITIES = {"accuracy": "accuracy (%)", "loss": "loss (log)"}  # and the labels of their axes
TIME_AND_ACCURACY = ("train_seconds", "tta_accuracy")
SECTIONS = {
    "ladder": "Published and measured",
    "differences": "Differences",
    "curves": "Accuracy and loss by epoch",
    "seeds": "Accuracy over seeds",
    "time": "Time against accuracy",
    "runs": "Runs, data and environments",
}


def html(groups: Sequence[ArmRuns], experiments: Sequence[Experiment], differences: Sequence[Table]) -> str:
    """The page.

    Args:
      groups: from `tables.grouped`; at least one.
      experiments: the declared recipes, which hold the published figures.
      differences: from `tables.differences`.
    """
    found = [record for group in groups for record in (*group.arm.records, *group.repeats)]
    statuses = ", ".join(f"{sum(record.status == status for record in found)} {status}" for status in STATUSES)
    newest = max(clean(record.started) for record in found)
    links = "".join(f'<li><a href="#{name}">{title}</a></li>' for name, title in SECTIONS.items())
    alike = list(_by_data(groups))
    parts = {
        "ladder": _ladder(groups, experiments),
        "differences": _differences(differences),
        "curves": _curves(groups),
        "seeds": _seeds(alike) if alike else ["<p>No run has finished.</p>"],
        "time": _time(alike) if alike else ["<p>No run has finished.</p>"],
        "runs": _runs(groups),
    }
    sections = "".join(
        f'<section aria-labelledby="{name}"><h2 id="{name}">{SECTIONS[name]}</h2>\n{"".join(part)}</section>\n'
        for name, part in parts.items()
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Training runs: published and measured</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>Training runs: published and measured</h1>
<p>{len(found)} records of {len(groups)} arms: {statuses}. The newest run began {escape(newest)}.</p>
<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>
<main>
{sections}</main>
<footer>Made from records by fastcifar_jax {escape(__version__)}.</footer>
</body>
</html>
"""


def _ladder(groups: Sequence[ArmRuns], experiments: Sequence[Experiment]) -> Iterator[str]:
    yield (
        "<p>Mean of the finished runs with its 95 % interval (Student's t); n of m: so many of m runs finished. "
        "Accuracy is that of the last epoch; training time leaves out compiling and evaluation. Published figures are "
        "of CIFAR-10, published times of one device of the kind named. The note says what the measured times are of, "
        "and whether recipe and data are the published ones.</p>"
    )
    if not experiments:
        yield "<p>No declared recipes were found here, so that there are no published figures.</p>"
    for i, table in enumerate(tables.ladder(groups, experiments)):
        yield table_html(table, f"ladder-{i}")


def _differences(found: Sequence[Table]) -> Iterator[str]:
    yield (
        "<p>Accuracy with test-time augmentation, in percentage points, of arms with two finished runs or more; the "
        "95 % interval is Welch's. p is corrected for the number of comparisons in the table (Holm); where that is "
        "below 0.05, a difference is called higher or lower. The runs to see it are those that each of two arms would "
        "need if the difference were as large as it looks (80 % power). A run that diverged or crashed has no "
        "accuracy and is left out, which flatters its arm.</p>"
    )
    if not found:
        yield "<p>No data set has two such arms.</p>"
    for i, table in enumerate(found):
        yield table_html(table, f"difference-{i}")


def _curves(groups: Sequence[ArmRuns]) -> Iterator[str]:
    yield (
        "<p>Thick: the mean of the finished runs, at epochs that all of them have. Thin: a run each; those that "
        "diverged or crashed end in a cross and may leave the frame. Without test-time augmentation; the loss is on a "
        "logarithmic scale. Charts of one data set have the same scales.</p>"
        '<div class="figures">'
    )
    shown = {
        (quantity, number): _lines(group, quantity) for quantity in QUANTITIES for number, group in _numbered(groups)
    }
    for number, group in _numbered(groups):
        drawn, missing = [], []
        for quantity, unit in QUANTITIES.items():
            lines = shown[quantity, number]
            if not any(line.seeds or line.unfinished for line in lines):
                missing.append(quantity)
                continue
            alike = [line for other, g in _numbered(groups) if g.data == group.data for line in shown[quantity, other]]
            # The others, whose loss may be anything, set the scale only where no run finished.
            runs = [run for line in alike for run in line.seeds] or [run for line in alike for run in line.unfinished]
            ys = [y for run in runs for _, y in run]
            log = quantity == "loss"
            marks = charts.log_ticks(min(ys), max(ys)) if log else charts.ticks_within(ys, 0, 100)
            name, title = f"{quantity}-{number}", f"{quantity.capitalize()} by epoch, {group.arm.name}"
            drawn.append(charts.lines(name, title, " ".join(map(_told, lines)), unit, lines, marks, log=log))
        caption = f"{_label(number, group)}: {_counts(group)}"
        if missing:
            caption += f"; no {' or '.join(missing)} to draw"
        yield f"<figure><figcaption>{caption}</figcaption>{''.join(drawn)}</figure>\n"
    yield "</div>"


def _lines(group: ArmRuns, quantity: str) -> list[Line]:
    """The test and the training curve of an arm, of the runs that have points."""
    lines = []
    for name, field in (("test", f"test_{quantity}"), ("training", f"train_{quantity}")):
        runs = [(record.status == "finished", _points(record, field)) for record in group.arm.records]
        seeds = [points for finished, points in runs if finished and points]
        by_epoch = [dict(points) for points in seeds]
        common = [epoch for epoch in by_epoch[0] if all(epoch in run for run in by_epoch)] if by_epoch else []
        mean = [(epoch, stats.summarize([run[epoch] for run in by_epoch]).mean) for epoch in common]
        lines.append(Line(name, name, mean, seeds, [points for finished, points in runs if points and not finished]))
    return lines


def _points(record: Record, field: str) -> list[tuple[float, float]]:
    """Epochs and values, accuracies in percent and losses above 0, that a chart can show."""
    scale, least = (100, 0) if field.endswith("accuracy") else (1, 1 / tables.LARGEST)
    rows = [(row.epoch, scale * getattr(row, field)) for row in record.epochs]
    return [(epoch, y) for epoch, y in rows if plausible(epoch) and plausible(y) and y >= least]


def _told(line: Line) -> str:
    if not line.mean:
        return f"{line.name.capitalize()}: no finished run."
    (first, start), (last, end) = line.mean[0], line.mean[-1]
    return f"{line.name.capitalize()}: {start:.4g} after epoch {first}, {end:.4g} after epoch {last}, on average."


def _seeds(by_data: Sequence[SameData]) -> Iterator[str]:
    yield (
        "<p>A dot is a finished run, with the test-time augmentation of its recipe; the upright stroke below is the "
        "mean, the line through it the 95 % interval of the mean, which may pass the frame. Arms that saw different "
        "images stand in different figures.</p>"
    )
    yield '<div class="figures">'
    for i, (source, alike) in enumerate(by_data):
        arms, told = [], []
        for number, group in alike:
            values = tables.values(group.arm, "tta_accuracy")
            summary = stats.summarize(values)
            arms.append(charts.Arm(number, group.arm.name, values, summary))
            told.append(f"{number} {group.arm.name}: {tables.measured(summary, percent)}, n = {summary.n}.")
        title = f"Accuracy over seeds, {source}"
        chart = charts.distribution(f"seeds-{i}", title, " ".join(told), "accuracy (%)", arms)
        yield f"<figure><figcaption>{escape(source)}</figcaption>{chart}</figure>\n"
    yield "</div>"


def _time(by_data: Sequence[SameData]) -> Iterator[str]:
    yield (
        "<p>Small dots are finished runs; the marker with the arm's number stands at the means, its lines are the "
        "95 % intervals. Better is higher and further left.</p>"
    )
    yield '<div class="figures">'
    for i, (source, alike) in enumerate(by_data):
        clouds, told, key = [], [], []
        for number, group in alike:
            arm = group.arm
            pairs = zip(*(values_of(arm, metric).values() for metric in TIME_AND_ACCURACY), strict=True)
            x, y = (stats.summarize(tables.values(arm, metric)) for metric in TIME_AND_ACCURACY)
            clouds.append(charts.Cloud(number, [pair for pair in pairs if all(map(plausible, pair))], x, y))
            told.append(f"{number} {arm.name}: {seconds(x.mean)}, {percent(y.mean)}.")
            sign = f'<svg viewBox="-6 -6 12 12" aria-hidden="true">{charts.marker(number, 0, 0)}</svg>'
            key.append(f"<li>{sign}{_label(number, group)}</li>")
        devices = dict.fromkeys(
            report.device_text(record.provenance.device) for _, group in alike for record in group.arm.records
        )
        where = f"{source}; {'times of different devices: ' * (len(devices) > 1)}{'; '.join(devices)}"
        units = ("training time (s)", "accuracy (%)")
        chart = charts.scatter(f"time-{i}", f"Training time against accuracy, {source}", " ".join(told), units, clouds)
        names = f'<ul class="key">{"".join(key)}</ul>'
        yield f"<figure><figcaption>{escape(clean(where))}</figcaption>{chart}{names}</figure>\n"
    yield "</div>"


def _runs(groups: Sequence[ArmRuns]) -> Iterator[str]:
    repeats = sum(len(group.repeats) for group in groups)
    if repeats:
        yield f"<p>{repeats} records repeat a seed of their arm; above, the newest finished one of a seed counts.</p>"
    for i, table in enumerate(tables.run_tables(groups)):
        yield table_html(table, f"run-{i}")


def table_html(table: Table, name: str) -> str:
    """A table in a box that scrolls by itself; `name` makes its id."""
    kinds = [
        "number" if column in table.numbers else "long" if column in ("note", "versions", "command", "error") else ""
        for column in table.columns
    ]
    attribute = lambda kind: f' class="{kind}"' if kind else ""
    head = "".join(
        f'<th scope="col"{attribute(kind)}>{escape(column)}</th>'
        for column, kind in zip(table.columns, kinds, strict=True)
    )
    rows = []
    for first, *rest in table.rows:
        cells = (f"<td{attribute(kind)}>{_cell(text, kind)}</td>" for text, kind in zip(rest, kinds[1:], strict=True))
        rows.append(f'<tr><th scope="row">{escape(clean(first))}</th>{"".join(cells)}</tr>\n')
    return (
        f'<div class="scroll" role="region" aria-labelledby="{name}" tabindex="0"><table>'
        f'<caption id="{name}"><span>{escape(clean(table.caption))}</span></caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{''.join(rows)}</tbody></table></div>\n"
    )


def _cell(text: str, kind: str) -> str:
    """Numbers break before a bracket, if at all."""
    text = escape(clean(text))
    return re.sub(r" (?!\()", "\u00a0", text) if kind == "number" else text


def _numbered(groups: Sequence[ArmRuns]) -> list[tuple[int, ArmRuns]]:
    return list(enumerate(groups, 1))


def _by_data(groups: Sequence[ArmRuns]) -> Iterator[SameData]:
    """The arms that have figures to show, data set by data set."""
    alike: dict[tuple, list[tuple[int, ArmRuns]]] = {}
    for number, group in _numbered(groups):
        if all(tables.values(group.arm, metric) for metric in TIME_AND_ACCURACY):
            alike.setdefault(group.data, []).append((number, group))
    for found in alike.values():
        yield tables.data_text(found[0][1].arm.records[0]), found


def _label(number: int, group: ArmRuns) -> str:
    return f"<b>{number}</b> {escape(group.arm.name)}"


def _counts(group: ArmRuns) -> str:
    counts = {status: sum(record.status == status for record in group.arm.records) for status in STATUSES}
    return ", ".join(f"{count} {status}" for status, count in counts.items() if count)
