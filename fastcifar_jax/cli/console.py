"""What a person sees on the terminal: tables, the lines of a run, its progress."""

import contextlib
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from fastcifar_jax.functions import steps_of_epochs
from fastcifar_jax.ops import backend
from fastcifar_jax.recipe import Published, Recipe, difference, flatten
from fastcifar_jax.report.text import device_text, percent, published_percent
from fastcifar_jax.runs.records import Record
from fastcifar_jax.runs.runner import Event, Existing, LoadedData, RunSpec, record_of
from fastcifar_jax.types import EpochInfo

LINE_SECONDS = 30  # between two lines of progress where there is no terminal

EPOCH_HEADER = f"{'epoch':>5}" + "".join(
    f"{name:>10}" for name in ("train s", "loss", "accuracy", "test", "TTA", "images/s")
)


def make_console() -> Console:
    """Standard output; where it is not a terminal, plain text wide enough for every table."""
    width = None if sys.stdout.isatty() else 160
    return Console(markup=False, emoji=False, highlight=False, width=width, soft_wrap=True)


def ladder(recipes: Sequence[Recipe]) -> Table:
    """The recipes of one module and what their source reports for them."""
    table = make_table(("name",), ("epochs", "published", "runs", "time"))
    for recipe in recipes:
        published = recipe.published
        accuracy = (
            "" if published.accuracy is None else f"{published_percent(published.accuracy)}{' TTA' * published.tta}"
        )
        seconds = "" if published.seconds is None else f"{published.seconds:g} s {published.device}"
        table.add_row(recipe.name, str(recipe.num_epochs), accuracy, str(published.runs or ""), seconds)
    return table


def details(recipe: Recipe, predecessor: Recipe | None) -> Iterator[str | Table]:
    """The whole recipe, its difference from its predecessor, and the size of its network for 10 classes."""
    yield f"{recipe.name}, hash {recipe.hash}"
    values = make_table(("name", "value"))
    for name, value in flatten(recipe).items():
        values.add_row(name, str(value))
    yield values
    if predecessor is not None:
        yield f"difference from its predecessor {predecessor.name}"
        changes = make_table(("name", predecessor.name, recipe.name))
        for name, (value, old) in difference(recipe, predecessor).items():
            changes.add_row(name, str(old), str(value))
        yield changes if changes.rows else "  none in training"

    size = size_of(recipe, 10)
    yield f"{size.trained:,} trained and {size.constant:,} constant parameters (10 classes)"
    yield f"{size.macs:,} multiply-accumulates in the forward pass of one 32x32 image"
    if recipe.published != Published():
        yield published_line(recipe)


class Size(NamedTuple):
    """Size of a network."""

    trained: int  # parameters
    constant: int  # parameters
    macs: int  # multiply-accumulates of the forward pass of one image of 32x32


def size_of(recipe: Recipe, num_classes: int) -> Size:
    """The size of a recipe's network, from shapes alone."""
    model = recipe.model(num_classes, "float32")  # the dtype makes no difference here
    images = jax.ShapeDtypeStruct((recipe.batch_size, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)), images)
    count = lambda collection: sum(leaf.size for leaf in jax.tree.leaves(variables[collection]))
    return Size(count("params"), count("constants"), sum(jax.tree.leaves(model.macs(variables, images))))


def published_line(recipe: Recipe) -> str:
    """What the source of a recipe reports for it."""
    published = recipe.published
    parts = []
    if published.accuracy is not None:
        runs = f", mean of {published.runs} runs" if published.runs else ""
        parts.append(f"test {published_percent(published.accuracy)}{' with TTA' * published.tta}{runs}")
    if published.seconds is not None:
        parts.append(f"{published.seconds:g} s on one {published.device}")
    return f"published for {recipe.name}: {', '.join(parts) or 'no figures'} ({published.source})"


def data_line(data: LoadedData, device: dict[str, Any]) -> str:
    """One line about a data set that was put on the device."""
    info = data.info
    return (
        f"{info.source}: {info.train:,} training and {info.test:,} test images, {len(info.classes)} classes; "
        f"{data.transfer_seconds:.2f} s to the device: {device_text(device)}"
    )


def dtype_line(dtype: str) -> str:
    """One line about the compute dtype of a run."""
    default, reason = backend.default_dtype()
    return f"computing in {dtype}: {reason}" if dtype == default else f"computing in {dtype}; the default is {default}"


def seed_line(arm: str, record: Record) -> str:
    """The summary of one run of an arm."""
    label = f"{arm}, seed {record.seed}"
    if record.status == "crashed":
        return f"{label}: crashed: {record.error}"
    if record.status == "diverged":
        return f"{label}: {record.error}"
    result = record.result or {}
    return (
        f"{label}: test {percent(result['test_accuracy'])}, TTA {percent(result['tta_accuracy'])}; "
        f"{result['train_seconds']:.2f} s training, {result['compile_seconds']:.2f} s compiling (not included); "
        f"{result['images_per_second']:,.0f} images/s; {record.provenance.data['source']}; "
        f"{device_text(record.provenance.device)}"
    )


def seeds_line(arm: str, records: Sequence[Record]) -> str:
    """Mean and sample standard deviation over the finished runs of one arm, at least two."""
    texts = []
    for label, name in (("test", "test_accuracy"), ("TTA", "tta_accuracy")):
        values = [record.result[name] for record in records if record.result]
        texts.append(f"{label} {percent(statistics.mean(values))}, s = {percent(statistics.stdev(values))}")
    return f"{arm}: n = {len(records)}; mean {'; '.join(texts)} (sample standard deviation)"


def arm_lines(spec: RunSpec, ended: Sequence[Event]) -> Iterator[str]:
    """The summary of an arm's runs, and its published figures if the runs can be compared with them."""
    records = [record for event in ended if event.spec is spec and (record := record_of(event)) and record.result]
    if len(records) > 1:
        yield seeds_line(spec.arm, records)
    if spec.matches_published and spec.recipe.published.accuracy is not None:
        yield published_line(spec.recipe)


def counts_line(ended: Sequence[Event], requested: int) -> str:
    """How the runs of one command ended, and how many were requested."""
    counts = Counter(record.status for event in ended if (record := record_of(event)))
    return (
        f"{len(ended)} of {requested} seeds: {counts['finished']} finished, {counts['diverged']} diverged, "
        f"{counts['crashed']} crashed; {sum(isinstance(event.news, Existing) for event in ended)} skipped because on "
        "record"
    )


class RunView:
    """Shows runs while they last: messages, epoch tables and the progress of the current epoch."""

    def __init__(self, console: Console):
        """Shows progress on `console` as a bar if it is a terminal, else as a line at most every `LINE_SECONDS`."""
        self.console = console
        columns = (*(TextColumn(f"{{task.{field}}}", markup=False) for field in ("description", "fields[rest]")),)
        self._progress = Progress(columns[0], BarColumn(), columns[1], console=console, transient=True)
        self._label, self._batch_size, self._steps = "", 0, [0]  # of the run; steps of each of its epochs
        self._began = self._printed = 0.0  # the current epoch, the last line
        self._compiled = False  # in this run

    def show(self, events: Iterable[Event], seeds: bool = False) -> Iterator[Event]:
        """The events, each after it was shown.

        Args:
          events: of `run_all` or `run_together`.
          seeds: whether several seeds train at the same time, so that each row names its own.
        """
        with self._progress if self.console.is_terminal else contextlib.nullcontext():
            for event in events:
                self._show(event, seeds)
                yield event

    def on_steps(self, epoch: int, step: int) -> None:
        """Shows that `step` steps of an epoch are done."""
        now = time.perf_counter()
        done, total = sum(self._steps[: epoch - 1]) + step, sum(self._steps)
        rate = step / (now - self._began)
        rest = f"step {done:,} of {total:,}, {rate * self._batch_size:,.0f} images/s, {_left((total - done) / rate)}"
        label = f"{self._label}: epoch {epoch} of {len(self._steps)}"
        if self.console.is_terminal:
            self._bar(label, rest, total=total, completed=done)
        elif now - self._printed > LINE_SECONDS:
            self._print(f"{label}, {rest}")

    def _show(self, event: Event, seeds: bool):
        spec, seed, news = event
        self._label, self._batch_size = f"{spec.arm}, seed {seed}", spec.recipe.batch_size
        self._steps = steps_of_epochs(spec.recipe, spec.data.info.train // self._batch_size)
        self._began = self._printed = time.perf_counter()
        header = Text(EPOCH_HEADER, style="bold")
        if isinstance(news, EpochInfo):
            if news.epoch == 1 and not seeds:
                self._print(header)
            rate = self._steps[news.epoch - 1] * self._batch_size / news.train_seconds
            self._print(epoch_row(news, rate) + f"   seed {seed}" * seeds)
        elif isinstance(news, str):
            phase, self._compiled = news in ("compiling", "training"), news == "compiling" or self._compiled
            if phase and self.console.is_terminal:
                self._bar(f"{self._label}: {news}")
            elif news != "training" or not self._compiled:  # one line is enough
                self._print(f"{self._label}: {news}")
            if seeds:
                self._print(header)
        else:
            self._compiled = False
            for task in self._progress.task_ids:
                self._progress.remove_task(task)
            line = seed_line(spec.arm, news.record if isinstance(news, Existing) else news)
            if isinstance(news, Existing):
                differs = f", with different {', '.join(news.differs)}" if news.differs else ""
                line += f" (on record{differs}; --rerun repeats it)"
            self._print(line)

    def _bar(self, label, rest="", **update):
        if not self._progress.task_ids:
            self._progress.add_task("", total=None, rest="")
        self._progress.update(self._progress.task_ids[0], description=label, rest=rest, **update)

    def _print(self, line):
        self._printed = time.perf_counter()
        self.console.print(line, soft_wrap=True)


def _left(seconds: float) -> str:
    """ "5 min left"."""
    return f"{seconds / 60:.0f} min left" if seconds >= 90 else f"{seconds:.0f} s left"


def epoch_row(info: EpochInfo, images_per_second: float) -> str:
    """One line below `EPOCH_HEADER`."""
    found = (info.train_accuracy, info.test_accuracy, info.tta_accuracy)
    accuracies = "".join(f"{'' if value is None else percent(value):>10}" for value in found)
    return f"{info.epoch:>5}{info.train_seconds:>10.2f}{info.train_loss:>10.4f}{accuracies}{images_per_second:>10,.0f}"


def make_table(left: Sequence[str], right: Sequence[str] = ()) -> Table:
    """An empty table with columns aligned on the left, then columns of numbers."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right", overflow="fold")
    return table
