"""Records as tables: arms beside their published figures, differences between arms, and every run with its origin."""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from fastcifar_jax.analysis import compare as comparison
from fastcifar_jax.analysis import stats
from fastcifar_jax.analysis.compare import METRICS, Arm, CompareOptions, group_arms, values_of
from fastcifar_jax.recipe import Published, Recipe, flatten
from fastcifar_jax.report.text import clean, data_text, device_text, percent, published_percent, seconds
from fastcifar_jax.runs import records
from fastcifar_jax.runs.experiments import Experiment
from fastcifar_jax.runs.provenance import data_key
from fastcifar_jax.runs.records import STATUSES, Record

CIFAR10 = ("cifar10", 50_000, 10_000)  # the data of the published figures
MAX_CHANGES = 3  # named in the note of an arm
MAX_VALUE = 1e12  # larger accuracies, losses and times are errors; sums of squares of smaller ones are finite


class Table(NamedTuple):
    """A table of texts; the first column names the row."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: frozenset[str] = frozenset()  # columns to align on the right


def arms_of(found: Sequence[Record], experiments: Sequence[Experiment] = ()) -> list[Arm]:
    """`group_arms` in the order of the experiments, with names that can be printed."""
    arms = group_arms(found, [experiment.recipe.name for experiment in experiments])
    return [arm._replace(name=clean(arm.name)) for arm in arms]


def plausible(value: float) -> bool:
    """Whether a number of a record can be an accuracy, a loss or a time; a file may contain any number."""
    return abs(value) < MAX_VALUE


def values(arm: Arm, metric: str) -> list[float]:
    """Values of the finished runs, in per cent, seconds or images per second."""
    return [value for value in values_of(arm, metric).values() if plausible(value)]


def summarize(arm: Arm, metric: str) -> stats.Summary | None:
    """Mean and 95 % interval over the finished runs; None if there are none."""
    found = values(arm, metric)
    return stats.summarize(found) if found else None


def changes(record: Record, recipe: Recipe) -> list[str]:
    """Differences of a run from the declared recipe on CIFAR-10, at most `MAX_CHANGES` of the recipe by name.

    A dtype that the recipe leaves to the device is not a difference.
    """
    declared = json.loads(records.dumps(flatten(recipe)))
    if declared["compute_dtype"] == "auto":
        declared["compute_dtype"] = record.recipe.get("compute_dtype")
    names = [name for name in {**declared, **record.recipe} if declared.get(name) != record.recipe.get(name)]
    found = [f"{name} {record.recipe.get(name)} instead of {declared.get(name)}" for name in names[:MAX_CHANGES]]
    if len(names) > MAX_CHANGES:
        found.append(f"{len(names) - MAX_CHANGES} more values")
    data = record.provenance.data
    return found if (data["source"], data["train"], data["test"]) == CIFAR10 else [data_text(data), *found]


LADDER = ("step", "epochs", "published", "published time", "n", "test", "with TTA", "training time", "note")


def ladder(arms: Sequence[Arm], experiments: Sequence[Experiment], show_all: bool = False) -> list[Table]:
    """Published and measured figures side by side, one table per module of experiments.

    Args:
      arms: from `arms_of`; those of undeclared recipes get a table of their own, the last.
      experiments: the declared recipes.
      show_all: whether to include recipes without records; their tables come after those with records.
    """
    of_recipe = lambda name: [arm for arm in arms if arm.records[0].experiment == name]
    tables: dict[bool, list[Table]] = {True: [], False: []}  # by whether anything was run
    for title in dict.fromkeys(experiment.title for experiment in experiments):
        rows = []
        for recipe in (experiment.recipe for experiment in experiments if experiment.title == title):
            rows += [_measured_row(arm, recipe) for arm in of_recipe(recipe.name)]
            if show_all and not of_recipe(recipe.name):
                rows.append((recipe.name, str(recipe.num_epochs), *_published(recipe), "", "", "", "", "not run"))
        if rows:
            tables[any(row[-1] != "not run" for row in rows)].append(_ladder_table(title, rows))
    declared = {experiment.recipe.name for experiment in experiments}
    rows = [_measured_row(arm, None) for arm in arms if arm.records[0].experiment not in declared]
    return [*tables[True], *tables[False], *([_ladder_table("Undeclared recipes", rows)] if rows else [])]


DIFFERENCES = ("arm", "n", "with TTA", "difference", "p (Holm)", "verdict", "runs to see it", "training time")


def differences(arms: Sequence[Arm], against: str | None = None, previous: bool = False) -> list[Table]:
    """Differences in accuracy with TTA, in percentage points, one table per data set, with the numbers of `compare`.

    Only arms with at least two finished runs are compared.

    Args:
      arms: from `arms_of`.
      against: name of the arm to compare with; the first arm of a data set if it has no arm of this name.
      previous: whether to compare each arm with the one above it instead.
    """
    options = CompareOptions(against_previous=previous)
    by_data: dict[tuple, list[Arm]] = {}
    for arm in sorted(arms, key=lambda arm: arm.name != against):  # stable
        found = values_of(arm, options.metric).values()
        if len(found) > 1 and all(map(plausible, found)):
            by_data.setdefault(data_key(arm.records[0].provenance), []).append(arm)
    return [_difference_table(alike, options) for alike in by_data.values() if len(alike) > 1]


def run_tables(arms: Sequence[Arm]) -> list[Table]:
    """The environments E1, E2, ..., the data sets D1, D2, ..., and every run, finished or not, referring to them."""
    environments: dict[tuple, str] = {}
    data: dict[tuple, str] = {}
    rows = []
    for arm in arms:
        for record in sorted((*arm.records, *arm.repeats), key=lambda record: record.seed):
            made = record.provenance
            versions = ", ".join(f"{name} {version}" for name, version in made.versions.items())
            environment = (device_text(made.device), versions, made.conv, made.mesh, made.source_hash[:8])
            digest, *counts = data_key(made)
            source = (made.data["source"], digest[:16], *(f"{count:,}" for count in counts))
            result: Any = record.result or {}
            show = lambda name, write, result=result: (
                write(result[name]) if name in result and plausible(result[name]) else ""
            )
            rows.append((
                arm.name, str(record.seed), record.status, show("test_accuracy", percent),
                show("tta_accuracy", percent), show("train_seconds", seconds), show("compile_seconds", seconds),
                record.recipe.get("compute_dtype", ""), data.setdefault(source, f"D{len(data) + 1}"),
                environments.setdefault(environment, f"E{len(environments) + 1}"),
                record.started, " ".join(record.command), record.error or "",
            ))  # fmt: skip
    named = lambda found: tuple((name, *values) for values, name in found.items())
    columns = ("arm", "seed", "status", "test", "with TTA", "training time", "compiling", "dtype", "data",
               "environment", "started", "command", "error")  # fmt: skip
    totals = ", ".join(f"{sum(row[2] == status for row in rows)} {status}" for status in STATUSES)
    return [
        Table("Environments", ("name", "device", "versions", "convolution", "mesh", "source hash"),
              named(environments)),
        Table("Data", ("name", "source", "hash", "training images", "test images"), named(data),
              frozenset({"training images", "test images"})),
        Table(f"Runs: {totals}", columns, tuple(rows), frozenset({"seed", *columns[3:7]})),
    ]  # fmt: skip


def measured(summary: stats.Summary | None, write: Callable[[float], str]) -> str:
    """For example "81.02 % (80.78 to 81.26)"; without an interval for a single run, empty without runs."""
    if summary is None:
        return ""
    low, high = (write(end).split()[0] for end in (summary.low, summary.high))
    return write(summary.mean) + (f" ({low} to {high})" if summary.n > 1 else "")


def of_100(value: float) -> str:
    """An accuracy in per cent, as `values` has it."""
    return percent(value / 100)


def status_counts(found: Sequence[Record], statuses: Sequence[str] = STATUSES) -> str:
    """For example "3 finished, 1 crashed"."""
    counts = {status: sum(record.status == status for record in found) for status in statuses}
    return ", ".join(f"{count} {status}" for status, count in counts.items() if count)


def markdown(tables: Sequence[Table]) -> str:
    """The tables as GitHub Markdown; names of rows that need no escape are set as code."""

    def code(text):
        text = clean(text)
        return f"`{text}`" if re.fullmatch(r"[\w.:@=+,/ -]*\w", text) else _escape_markdown(text)

    parts = []
    for table in tables:
        alignment = ["--:" if name in table.numbers else ":--" for name in table.columns]
        rows = [(code(first), *map(_escape_markdown, rest)) for first, *rest in table.rows]
        lines = [f"| {' | '.join(row)} |" for row in (table.columns, alignment, *rows)]
        parts.append("\n".join((f"**{_escape_markdown(table.caption)}**", "", *lines, "")))
    return "\n".join(parts)


def _escape_markdown(value):
    # An underscore between letters or digits is not emphasis.
    return re.sub(r"([\\`*~\[\]<>&|]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", clean(value))


def _difference_table(arms, options):
    answer = comparison.compare(arms, options)
    rows = []
    for arm, d in zip(arms, (None, *answer["differences"]), strict=True):
        shown = _difference(d) if d else ("", "", "", "")
        tta, time = summarize(arm, options.metric), summarize(arm, "train_seconds")
        rows.append((arm.name, _count(arm), measured(tta, of_100), *shown, measured(time, seconds)))
    base = "the arm above it" if options.against_previous else arms[0].name
    caption = f"Each against {base}: {data_text(arms[0].records[0].provenance.data)}"
    return Table(clean(caption), DIFFERENCES, tuple(rows), frozenset(DIFFERENCES[1:]) - {"verdict"})


def _difference(d):
    size = f"{d['estimate']:+.2f} ({d['low']:+.2f} to {d['high']:+.2f})"
    needed = d["runs_for_observed"]
    return size, f"{d['p_holm']:.2g}", d["verdict"], f"{needed:,}" if needed else ""


def _ladder_table(caption, rows):
    return Table(clean(caption), LADDER, tuple(rows), frozenset(LADDER[1:-1]))


def _measured_row(arm, recipe):
    test, tta, time = (summarize(arm, metric) for metric in METRICS[:3])
    published = _published(recipe) if recipe else ("", "")
    cells = (_count(arm), measured(test, of_100), measured(tta, of_100), measured(time, seconds))
    return (arm.name, clean(arm.records[0].recipe.get("num_epochs", "")), *published, *cells, _note(arm, recipe))


def _count(arm):
    """ "5", or "3 of 5" where some have not finished."""
    finished, count = len(values(arm, "test_accuracy")), len(arm.records)
    return str(finished) if finished == count else f"{finished} of {count}"


def _note(arm, recipe):
    """Whether the arm can be compared with the published figures, the unfinished runs, and the devices."""
    notes = []
    if recipe is not None:
        found = "; ".join(changes(arm.records[0], recipe))
        if recipe.published == Published():
            notes.append(f"Changed: {found}" if found else "As declared, on CIFAR-10")
        else:
            notes.append(f"Not comparable: {found}" if found else "Comparable: recipe and data as published")
    notes += filter(None, (status_counts(arm.records, [status]) for status in STATUSES[1:]))
    devices = dict.fromkeys(device_text(record.provenance.device) for record in arm.records)
    notes.append(f"{'Different devices' if len(devices) > 1 else 'Device'}: {'; '.join(devices)}")
    return " ".join(f"{note}." for note in notes)


def _published(recipe):
    figures = recipe.published
    runs = f", n = {figures.runs}" if figures.runs else ""
    accuracy = "" if figures.accuracy is None else published_percent(figures.accuracy)
    time = "" if figures.seconds is None else f"{figures.seconds:g} s, {figures.device}"
    return f"{accuracy}{' TTA' * (figures.tta and bool(accuracy))}{runs if accuracy else ''}", time
