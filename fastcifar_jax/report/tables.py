"""What records say, as tables: arms beside what is published for them, and every run with its data and environment."""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from fastcifar_jax.analysis import compare as comparison
from fastcifar_jax.analysis import stats
from fastcifar_jax.analysis.compare import METRICS, Arm, CompareOptions, arm_name, values_of
from fastcifar_jax.cli import console as report
from fastcifar_jax.recipe import Published, Recipe, flatten
from fastcifar_jax.runs import records
from fastcifar_jax.runs.experiments import Experiment
from fastcifar_jax.runs.provenance import data_key
from fastcifar_jax.runs.records import STATUSES, Record

CIFAR10 = ("cifar10", 50_000, 10_000)  # the data that published figures are of
CHANGES_SHOWN = 3  # of a recipe that is not the declared one
LONGEST = 500  # characters of a cell
LARGEST = 1e12  # no accuracy, loss or time is larger; a sum of squares of such numbers is still finite


class Table(NamedTuple):
    """A table of texts, of which the first column names the row."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: frozenset[str] = frozenset()  # columns to align on the right


class ArmRuns(NamedTuple):
    """An arm, and the records of seeds of which the arm has another record."""

    arm: Arm
    repeats: tuple[Record, ...] = ()

    @property
    def data(self) -> tuple[str, int, int]:
        """Hash, number of training images, number of test images: arms that differ in it cannot be compared."""
        return _data_key(self.arm.records[0])


def grouped(found: Sequence[Record], experiments: Sequence[Experiment]) -> list[ArmRuns]:
    """Records grouped into arms: one framework, recipe and data set each.

    Of several records of a seed a finished one counts before others, and the newest of those.

    Args:
      found: in any order.
      experiments: their order is that of the arms; unknown names come last.
    """
    by_arm: dict[tuple, list[Record]] = {}
    for record in found:
        key = (record.framework, record.experiment, record.recipe_hash, _data_key(record))
        by_arm.setdefault(key, []).append(record)
    order = {experiment.recipe.name: i for i, experiment in enumerate(experiments)}
    groups = []
    for key in sorted(by_arm, key=lambda key: (order.get(key[1], len(order)), key[1], key[0], key[2:])):
        newest = sorted(by_arm[key], key=lambda record: (record.status == "finished", record.started))
        chosen = {record.seed: record for record in newest}
        repeats = tuple(record for record in newest if record is not chosen[record.seed])
        namesakes = [other for other in by_arm if other[:2] == key[:2]]
        name = arm_name(*key[:2])
        name += f"@{key[2][:8]}" if len({other[2] for other in namesakes}) > 1 else ""
        if len({other[3] for other in namesakes}) > 1:
            name += " on {source}, {train:,} images".format_map(newest[0].provenance.data)
        groups.append(ArmRuns(Arm(clean(name), tuple(chosen[seed] for seed in sorted(chosen))), repeats))
    return groups


def plausible(value: float) -> bool:
    """Whether a number of a record can be counted with; a file may hold any."""
    return abs(value) < LARGEST


def values(arm: Arm, metric: str) -> list[float]:
    """Of the finished runs, in percent, seconds or images per second."""
    return [value for value in values_of(arm, metric).values() if plausible(value)]


def summarize(arm: Arm, metric: str) -> stats.Summary | None:
    """Mean and 95 % interval of the finished runs; None where there are none."""
    found = values(arm, metric)
    return stats.summarize(found) if found else None


def changes(record: Record, recipe: Recipe) -> list[str]:
    """What keeps a run from being one of the declared recipe on the data that its published figures are of.

    A dtype that the recipe leaves to the machine is no change.
    """
    declared = json.loads(records.dumps(flatten(recipe)))
    if declared["compute_dtype"] == "auto":
        declared["compute_dtype"] = record.recipe.get("compute_dtype")
    names = [name for name in {**declared, **record.recipe} if declared.get(name) != record.recipe.get(name)]
    told = [f"{name} {record.recipe.get(name)} instead of {declared.get(name)}" for name in names[:CHANGES_SHOWN]]
    if len(names) > CHANGES_SHOWN:
        told.append(f"{len(names) - CHANGES_SHOWN} more values")
    data = record.provenance.data
    if (data["source"], data["train"], data["test"]) != CIFAR10:
        told.insert(0, data_text(record))
    return told


LADDER = ("step", "epochs", "published", "published time", "n", "test", "with TTA", "training time", "note")


def ladder(groups: Sequence[ArmRuns], experiments: Sequence[Experiment]) -> list[Table]:
    """Published and measured side by side: a table for each module of experiments, the measured modules first.

    A module without published figures shows only what has records. Arms of no declared recipe come last.
    """
    tables, known = [], {experiment.recipe.name for experiment in experiments}
    on_record = {group.arm.records[0].experiment for group in groups}
    titles = dict.fromkeys(experiment.title for experiment in experiments)
    of_title = lambda title: [experiment.recipe for experiment in experiments if experiment.title == title]
    for title in sorted(titles, key=lambda title: not any(recipe.name in on_record for recipe in of_title(title))):
        whole = any(recipe.published != Published() for recipe in of_title(title))
        rows = []
        for recipe in of_title(title):
            arms = [group.arm for group in groups if group.arm.records[0].experiment == recipe.name]
            rows += [_measured_row(arm, recipe) for arm in arms]
            if whole and not arms:
                rows.append((recipe.name, str(recipe.num_epochs), *_published(recipe), "", "", "", "", "not run"))
        if rows:
            tables.append(_ladder_table(title, rows))
    rows = [_measured_row(group.arm, None) for group in groups if group.arm.records[0].experiment not in known]
    return [*tables, _ladder_table("Recipes that no module declares", rows)] if rows else tables


DIFFERENCES = ("arm", "n", "with TTA", "difference", "p (Holm)", "verdict", "runs to see it", "training time")


def differences(groups: Sequence[ArmRuns], against: str | None = None, previous: bool = False) -> list[Table]:
    """The arms' accuracies with TTA against another's, in points: a table for each data set that has arms to compare.

    Those are arms of two finished runs or more. The numbers are those of `comparison.compare`.

    Args:
      groups: from `grouped`.
      against: the arm that the others are compared with; the first of a data set where that has no arm of this name.
      previous: whether each arm is compared with the one above it instead.
    """
    question = CompareOptions(against_previous=previous)
    by_data: dict[tuple, list[Arm]] = {}
    for group in groups:
        found = values_of(group.arm, question.metric).values()
        if len(found) > 1 and all(map(plausible, found)):
            by_data.setdefault(group.data, []).append(group.arm)
    return [
        _difference_table(sorted(arms, key=lambda arm: arm.name != against), question)  # stable
        for arms in by_data.values()
        if len(arms) > 1
    ]


def run_tables(groups: Sequence[ArmRuns]) -> list[Table]:
    """Every run, finished or not; the data sets and the environments that its row refers to as D1, E1 and so on."""
    environments: dict[tuple, str] = {}
    data: dict[tuple, str] = {}
    rows = []
    for group in groups:
        for record in sorted((*group.arm.records, *group.repeats), key=lambda record: record.seed):
            versions = ", ".join(f"{name} {version}" for name, version in record.provenance.versions.items())
            dtype = record.recipe.get("compute_dtype", "")
            made = record.provenance
            environment = (report.device_text(made.device), versions, made.conv, made.mesh, made.source_hash[:8])
            digest, *counts = _data_key(record)
            source = (made.data["source"], digest[:16], *(f"{count:,}" for count in counts))
            result = record.result or {}
            shown = (_percent(result.get("test_accuracy")), _percent(result.get("tta_accuracy")))
            times = (_seconds(result.get("train_seconds")), _seconds(result.get("compile_seconds")))
            rows.append((
                group.arm.name, str(record.seed), record.status, *shown, *times, dtype,
                data.setdefault(source, f"D{len(data) + 1}"),
                environments.setdefault(environment, f"E{len(environments) + 1}"),
                record.started, " ".join(record.command), record.error or "",
            ))  # fmt: skip
    of = lambda found: tuple((name, *values) for values, name in found.items())
    columns = ("arm", "seed", "status", "test", "with TTA", "training time", "compiling", "dtype", "data",
               "environment", "started", "command", "error")  # fmt: skip
    counts = ", ".join(f"{sum(row[2] == status for row in rows)} {status}" for status in STATUSES)
    return [
        Table("Environments", ("name", "device", "versions", "convolution", "mesh", "source hash"),
              of(environments)),
        Table("Data", ("name", "source", "hash", "training images", "test images"), of(data),
              frozenset({"training images", "test images"})),
        Table(f"Runs: {counts}", columns, tuple(rows), frozenset({"seed", *columns[3:7]})),
    ]  # fmt: skip


def data_text(record: Record) -> str:
    """ "digits, 1,437 training and 360 test images"."""
    return clean("{source}, {train:,} training and {test:,} test images".format_map(record.provenance.data))


def measured(summary: stats.Summary | None, show: Callable[[float], str]) -> str:
    """ "81.02 % (80.78 to 81.26)"; without an interval for a single run, and empty without runs."""
    if summary is None:
        return ""
    low, high = (show(end).split()[0] for end in (summary.low, summary.high))
    return show(summary.mean) + (f" ({low} to {high})" if summary.n > 1 else "")


def percent(value: float) -> str:
    """ "94.08 %"."""
    return f"{value:.2f} %"


def seconds(value: float) -> str:
    """ "0.53 s", "26.1 s", "1,565 s"."""
    return f"{value:,.{2 if abs(value) < 10 else 1 if abs(value) < 100 else 0}f} s"


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


def clean(value: Any) -> str:
    """A value of a record as one line of at most LONGEST characters; those that cannot be shown become U+FFFD."""
    text = " ".join(str(value)[: 2 * LONGEST].split())
    text = text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}\u2026"
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def _escape_markdown(value):
    # An underscore between letters or digits is no emphasis.
    return re.sub(r"([\\`*~\[\]<>&|]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", clean(value))


def _data_key(record):
    return data_key(record.provenance)


def _difference_table(arms, question):
    answer = comparison.compare(arms, question)
    rows = []
    for arm, d in zip(arms, (None, *answer["differences"]), strict=True):
        shown = _difference(d) if d else ("", "", "", "")
        tta, time = summarize(arm, question.metric), summarize(arm, "train_seconds")
        rows.append((arm.name, _count(arm), measured(tta, percent), *shown, measured(time, seconds)))
    base = "the arm above it" if question.previous else arms[0].name
    caption = f"Each against {base}: {data_text(arms[0].records[0])}"
    return Table(clean(caption), DIFFERENCES, tuple(rows), frozenset(DIFFERENCES[1:]) - {"verdict"})


def _difference(d):
    size = f"{d['estimate']:+.2f} ({d['low']:+.2f} to {d['high']:+.2f})"
    verdict = "none shown" if d["p_holm"] >= 0.05 else "higher" if d["estimate"] > 0 else "lower"
    needed = d["runs_for_observed"]
    return size, f"{d['p_holm']:.2g}", verdict, f"{needed:,}" if needed else ""


def _ladder_table(caption, rows):
    return Table(clean(caption), LADDER, tuple(rows), frozenset(LADDER[1:-1]))


def _measured_row(arm, recipe):
    first = arm.records[0]
    test, tta, time = (summarize(arm, metric) for metric in METRICS[:3])
    published = _published(recipe) if recipe else ("", "")
    cells = (_count(arm), measured(test, percent), measured(tta, percent), measured(time, seconds))
    return (arm.name, clean(first.recipe.get("num_epochs", "")), *published, *cells, _note(arm, recipe))


def _count(arm):
    """ "5", or "3 of 5" where some have not finished."""
    finished, count = len(values(arm, "test_accuracy")), len(arm.records)
    return str(finished) if finished == count else f"{finished} of {count}"


def _note(arm, recipe):
    """Whether the published figures are of the same, what became of unfinished runs, and where an arm ran."""
    notes = []
    if recipe is not None:
        told = "; ".join(changes(arm.records[0], recipe))
        if recipe.published == Published():
            notes.append(f"Changed: {told}" if told else "As declared, on CIFAR-10")
        else:
            notes.append(f"Not comparable: {told}" if told else "Comparable: recipe and data as published")
    for status in STATUSES[1:]:
        if count := sum(record.status == status for record in arm.records):
            notes.append(f"{count} {status}")
    devices = dict.fromkeys(report.device_text(record.provenance.device) for record in arm.records)
    notes.append(f"{'Different devices' if len(devices) > 1 else 'Device'}: {'; '.join(devices)}")
    return " ".join(f"{note}." for note in notes)


def _published(recipe):
    figures = recipe.published
    runs = f", n = {figures.runs}" if figures.runs else ""
    accuracy = "" if figures.accuracy is None else report.published_percent(figures.accuracy)
    time = "" if figures.seconds is None else f"{figures.seconds:g} s, {figures.device}"
    return f"{accuracy}{' TTA' * (figures.tta and bool(accuracy))}{runs if accuracy else ''}", time


def _percent(fraction):
    return "" if fraction is None or not plausible(fraction) else percent(100 * fraction)


def _seconds(value):
    return "" if value is None or not plausible(value) else seconds(value)
