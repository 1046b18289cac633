"""What the commands that run recipes have in common: their options, and the jobs that these stand for."""

import contextlib
import functools
import importlib
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import click
from rich.console import Console

from fastcifar_jax.analysis.compare import arm_name, parse_arm
from fastcifar_jax.cli.console import data_line, dtype_line
from fastcifar_jax.functions import check_trainable
from fastcifar_jax.models.base import PRECISIONS
from fastcifar_jax.ops import backend, devices
from fastcifar_jax.recipe import Recipe, change, resolve_dtype
from fastcifar_jax.runs import experiments, files, provenance, runner
from fastcifar_jax.runs.runner import LoadedData, RunSettings, RunSpec

MAX_ARMS = 10_000  # of a sweep


class CliContext(NamedTuple):
    """What every command is given."""

    folder: Path | None  # of the experiments
    arguments: tuple[str, ...]


class RunOptions(NamedTuple):
    """How recipes are changed and run; the fields are the options below."""

    data: str | None
    epochs: int | None
    limit_train: int | None
    width: int | None
    dtype: str | None
    assignments: tuple[str, ...]
    sweeps: tuple[str, ...]
    out: Path
    rerun: bool
    checkpoint: bool
    save: bool
    tta_every_epoch: bool
    deterministic: bool

    def settings(self, context: CliContext) -> RunSettings:
        """How runs are made and kept."""
        return RunSettings(self.out, context.arguments, self.rerun, self.checkpoint, self.save, self.tta_every_epoch)

    def changed(self, recipe: Recipe, variant: Sequence[str]) -> Recipe:
        """The recipe with these options and the assignments of one arm of a sweep."""
        return change(recipe, (*self.assignments, *variant), self.epochs, self.width, self.dtype)


# Options that several commands have.
data_option = click.option(
    "--data", metavar="SOURCE", help="A data set's name or a path; else $FASTCIFAR_DATA; else cifar10."
)
epochs_option = click.option("--epochs", type=int, help="Moves the schedule's knots along; applied after --set.")
limit_train_option = click.option("--limit-train", type=int, metavar="N", help="The first N training images only.")
width_option = click.option("--width", type=int, help="Channels of the first layer; the others keep their ratios.")
set_option = click.option(
    "--set", "assignments", multiple=True, metavar="NAME=VALUE", help="A value of `show`; repeats."
)
json_option = click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Also write the answer there."
)


def write_json(path: Path | None, answer: Any) -> None:
    """Writes the answer of a command where its `json_option` says."""
    if path:
        files.write_text(path, files.dumps(answer))


def run_options(command: Callable) -> Callable:
    """Gives a command the options of `RunOptions`, which it receives as its argument `options`."""

    @functools.wraps(command)
    def with_options(*args, **kwargs):
        options = RunOptions(**{name: kwargs.pop(name) for name in RunOptions._fields})
        return command(*args, options=options, **kwargs)

    folder = click.Path(file_okay=False, path_type=Path)
    for option in (
        click.option("--deterministic", is_flag=True, help="On a GPU: equal bits for equal seeds, slower."),
        click.option(
            "--tta-every-epoch", is_flag=True, help="Test-time augmentation after every epoch, not only the last."
        ),
        click.option("--save", is_flag=True, help="Also keep the trained models, beside their records."),
        click.option("--checkpoint", is_flag=True, help="Save the state every epoch; continue from it if killed."),
        click.option("--rerun", is_flag=True, help="Also run what is on record as finished or diverged."),
        click.option("--out", type=folder, default="runs", show_default=True, help="Folder of the records."),
        click.option("--sweep", "sweeps", multiple=True, metavar="NAME=V,V", help="An arm for each value; repeats."),
        set_option,
        click.option("--dtype", type=click.Choice(tuple(PRECISIONS)), help="The compute dtype; default by platform."),
        width_option,
        limit_train_option,
        epochs_option,
        data_option,
    ):
        with_options = option(with_options)
    return with_options


def variants(sweeps: Sequence[str]) -> list[tuple[str, ...]]:
    """The assignments of each arm of a sweep.

    Returns:
      One empty tuple without sweeps.

    Raises:
      ValueError: more than `MAX_ARMS` of them.

    Example:
      >>> variants(["a=1,2", "b=3"])
      [('a=1', 'b=3'), ('a=2', 'b=3')]
    """
    axes = []
    for text in sweeps:
        name, equals, values = text.partition("=")
        axes.append([f"{name}{equals}{value}" for value in values.split(",")])
    if (count := math.prod(map(len, axes))) > MAX_ARMS:
        raise ValueError(f"the sweeps make {count:,} arms of each recipe; give at most {MAX_ARMS:,}")
    return list(itertools.product(*axes))


def parse_seeds(text: str) -> range:
    """Seeds 0 to 4 of "5", seeds 3 to 9 of "3-9".

    Raises:
      ValueError: neither, or no seed.

    Example:
      >>> parse_seeds("5"), parse_seeds("3-9")
      (range(0, 5), range(3, 10))
    """
    first, dash, last = text.partition("-")
    if len(text) <= 30 and first.isdecimal() and (last.isdecimal() if dash else True):
        seeds = range(int(first), int(last) + 1) if dash else range(int(first))
        if seeds and seeds[-1] < 2**32:  # JAX drops the higher bits of a seed
            return seeds
    raise ValueError(f"{text!r:.80} names no seeds; give a count such as 5 (seeds 0 to 4) or a range such as 0-9")


def seeds_option(default: str | None) -> Callable:
    """The option `--seeds`, a `range` or None."""
    show, text = default is not None, "A count, or a range: 0-9."
    return click.option("--seeds", type=parse_seeds, default=default, show_default=show, metavar="SEEDS", help=text)


@contextlib.contextmanager
def usage_errors(name: str = "") -> Iterator[None]:
    """Turns a ValueError, which a user can fix, into one line instead of a traceback."""
    try:
        yield
    except ValueError as error:
        raise click.UsageError(f"{name}: {error}".removeprefix(": ")) from error


def make_specs(context: CliContext, names: Sequence[str], options: RunOptions, console: Console) -> list[RunSpec]:
    """The recipes that arms stand for, each once, changed by the options and checked against their data.

    Args:
      context: of the command.
      names: arms as `parse_arm` takes them, without hashes.
      options: of the command.
      console: shows which data are loaded.

    Raises:
      click.UsageError: names, values or data that cannot be used.
    """
    with usage_errors():
        backend.configure(options.deterministic)  # before anything asks JAX for a device
    if unused := devices.unused_gpu():
        gpu, reason = unused
        console.print(f"a GPU is present ({gpu.name}) but JAX uses the CPU: {reason}; the command doctor shows more")
    load_once = functools.cache(lambda source: load_data(source, options.limit_train, console))
    specs: dict[str, RunSpec] = {}
    with usage_errors():
        parsed = [parse_arm(text) for text in names]
        if options.checkpoint and any(framework == "torch" for framework, _, _ in parsed):
            raise ValueError("torch: arms have no checkpoints; leave out --checkpoint, or run them by themselves")
        found = [experiments.resolve((name,), context.folder) for _, name, _ in parsed]  # all, before data are loaded
        for (framework, _, _), declared in zip(parsed, found, strict=True):
            twin = twin_of(framework)
            for experiment, variant in itertools.product(declared, variants(options.sweeps)):
                arm = arm_name(framework, experiment.recipe.name, variant)
                with usage_errors(arm):
                    recipe = options.changed(experiment.recipe, variant)
                data = load_once(options.data or os.environ.get("FASTCIFAR_DATA") or experiment.data or "cifar10")
                with usage_errors(arm):
                    whole = data.info.source == "cifar10" and options.limit_train is None
                    matches_published = whole and recipe == resolve_dtype(experiment.recipe)
                    spec = checked(RunSpec(arm, recipe, experiment.path, matches_published, data, twin))
                specs.setdefault(arm, spec)
    for dtype in dict.fromkeys(spec.recipe.compute_dtype for spec in specs.values()):
        console.print(dtype_line(dtype))
    return list(specs.values())


def load_data(source: str, limit_train: int | None, console: Console) -> LoadedData:
    """A data set on the device; says so on the console."""
    console.print(f"loading {source}")
    data = runner.load_data(source, limit_train)
    console.print(data_line(data, provenance.device()))
    return data


def checked(spec: RunSpec) -> RunSpec:
    """The same, after `check_trainable` of its framework."""
    check_trainable(spec.recipe, len(spec.data.info.classes), spec.data.dataset)
    if spec.twin:
        spec.twin.check_trainable(spec.recipe)
    return spec


def twin_of(framework: str) -> ModuleType | None:
    """What trains recipes in PyTorch; None for JAX.

    Raises:
      ValueError: PyTorch cannot be imported.
    """
    if framework == "jax":
        return None
    try:
        return importlib.import_module("fastcifar_jax.torch_baseline.train")
    except ImportError as error:
        raise ValueError(f"torch: arms need PyTorch: {error}; pip install -e '.[compare]'") from error
