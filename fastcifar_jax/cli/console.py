"""What a person sees on the terminal: tables, the lines of a run, its progress."""

import contextlib
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from rich import box
from rich.console import Console, JustifyMethod
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from fastcifar_jax.recipe import Published, Recipe, difference, flatten
from fastcifar_jax.report.text import device_text, percent, published_percent
from fastcifar_jax.runs.records import Record
from fastcifar_jax.train import steps_of_epochs
from fastcifar_jax.types import EpochInfo

OnEpoch = Callable[[EpochInfo], None]
OnStep = Callable[[int, int, Any], None]
OnCompiled = Callable[[float], None]


def make_console() -> Console:
    """Standard output; plain text, and wide enough for every table, where it is no terminal."""
    width = None if sys.stdout.isatty() else 160
    return Console(markup=False, emoji=False, highlight=False, width=width)


def ladder(recipes: Sequence[Recipe]) -> Table:
    """The recipes of one module and what their source reports for them."""
    table = make_table("name", ("epochs", "right"), ("published", "right"), ("runs", "right"), ("time", "right"))
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
    values = make_table("name", "value")
    for name, value in flatten(recipe).items():
        values.add_row(name, str(value))
    yield values
    if predecessor is not None:
        yield f"difference from its predecessor {predecessor.name}"
        changes = make_table("name", predecessor.name, recipe.name)
        for name, (value, old) in difference(recipe, predecessor).items():
            changes.add_row(name, str(old), str(value))
        yield changes if changes.rows else "  none in training"

    size = size_of(recipe, 10)
    yield f"{size.trained:,} trained and {size.frozen:,} frozen parameters (10 classes)"
    yield f"{size.macs:,} multiply-accumulates in the forward pass of one 32x32 image"
    if recipe.published != Published():
        yield published_line(recipe)


class Size(NamedTuple):
    """Of a network."""

    trained: int  # parameters
    frozen: int  # parameters
    macs: int  # multiply-accumulates of the forward pass of one image of 32x32


def size_of(recipe: Recipe, num_classes: int) -> Size:
    """The size of a recipe's network, from shapes alone."""
    model = recipe.model(num_classes, "float32")  # of no consequence here
    images = jax.ShapeDtypeStruct((recipe.batch_size, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)), images)
    trained, frozen = (sum(leaf.size for leaf in jax.tree.leaves(variables[name])) for name in ("params", "constants"))
    return Size(trained, frozen, sum(jax.tree.leaves(model.macs(variables, images))))


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
        f"{result['train_seconds']:.2f} s training, {result['compile_seconds']:.2f} s compiling apart; "
        f"{result['images_per_second']:,.0f} images/s; {record.data['source']}; {device_text(record.device)}"
    )


def seeds_line(arm: str, records: Sequence[Record]) -> str:
    """Mean and sample standard deviation over the finished runs of one arm, at least two."""
    texts = []
    for label, name in (("test", "test_accuracy"), ("TTA", "tta_accuracy")):
        values = [record.result[name] for record in records if record.result]
        texts.append(f"{label} {percent(statistics.mean(values))}, s = {percent(statistics.stdev(values))}")
    return f"{arm}: n = {len(records)}; mean {'; '.join(texts)} (sample standard deviation)"


def counts_line(records: Sequence[Record], asked: int, skipped: int) -> str:
    """How the seeds of one command ended, and how many were asked for."""
    count = lambda status: sum(record.status == status for record in records)
    return (
        f"{len(records)} of {asked} seeds: {count('finished')} finished, {count('diverged')} diverged, "
        f"{count('crashed')} crashed; {skipped} skipped because on record"
    )


@contextlib.contextmanager
def watch(
    console: Console, label: str, recipe: Recipe, num_train: int, *, compiles: bool, each_step: bool
) -> Iterator[tuple[OnEpoch, OnStep | None, OnCompiled]]:
    """Shows a run while it lasts: its epoch table, and on a terminal a bar below it.

    Args:
      console: where to.
      label: of the run.
      recipe: what is run.
      num_train: number of training images.
      compiles: whether the run begins by compiling.
      each_step: whether the bar may be told of every step, for which the device has to be waited for.

    Yields:
      `on_epoch`, `on_step` and `on_compiled` of a training function.
    """
    of_epochs = steps_of_epochs(recipe, num_train // recipe.batch_size)
    begins = "compiling" if compiles else "training"

    def print_row(info):
        if info.epoch == 1:
            console.print(Text(EPOCH_HEADER, style="bold"), soft_wrap=True)
        console.print(
            epoch_row(info, of_epochs[info.epoch - 1] * recipe.batch_size / info.train_seconds), soft_wrap=True
        )

    if not console.is_terminal:
        console.print(f"{label}: {begins}", soft_wrap=True)
        yield print_row, None, lambda seconds: None
        return

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, refresh_per_second=4) as progress:
        task = progress.add_task(f"{label}: {begins}", total=None)

        def on_step(epoch, step, totals):
            del totals
            progress.update(
                task,
                description=f"{label}: epoch {epoch} of {recipe.num_epochs}",
                total=sum(of_epochs),
                completed=sum(of_epochs[: epoch - 1]) + step,
            )

        def on_epoch(info):
            print_row(info)
            on_step(info.epoch, of_epochs[info.epoch - 1], None)

        yield (
            on_epoch,
            on_step if each_step else None,
            lambda seconds: progress.update(task, description=f"{label}: training"),
        )


EPOCH_HEADER = f"{'epoch':>5}" + "".join(
    f"{name:>10}" for name in ("train s", "loss", "accuracy", "test", "TTA", "images/s")
)


def epoch_row(info: EpochInfo, images_per_second: float) -> str:
    """One line below `EPOCH_HEADER`."""
    accuracies = "".join(
        f"{percent(value):>10}" for value in (info.train_accuracy, info.test_accuracy, info.tta_accuracy)
    )
    return f"{info.epoch:>5}{info.train_seconds:>10.2f}{info.train_loss:>10.4f}{accuracies}{images_per_second:>10,.0f}"


def make_table(*columns: str | tuple[str, JustifyMethod]) -> Table:
    """An empty table; a column is a name, or a name and its justification."""
    table = Table(box=box.SIMPLE_HEAD)
    for column in columns:
        name, justify = (column, cast(JustifyMethod, "left")) if isinstance(column, str) else column
        table.add_column(name, justify=justify, overflow="fold")
    return table
