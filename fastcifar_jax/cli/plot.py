"""The command `plot`: figures of recipes, records and networks."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from fastcifar_jax.cli import console as report
from fastcifar_jax.cli.options import (
    CliContext,
    data_option,
    epochs_option,
    limit_train_option,
    load_data,
    set_option,
    usage_errors,
    width_option,
)
from fastcifar_jax.models.activations import Celu, Gelu, Relu
from fastcifar_jax.ops import backend
from fastcifar_jax.recipe import Recipe, change
from fastcifar_jax.report import figures, plot_data, run_figures
from fastcifar_jax.report.drawing import render
from fastcifar_jax.report.network import draw, layers_of
from fastcifar_jax.runs import experiments as discover
from fastcifar_jax.runs import files, records
from fastcifar_jax.runs.runner import LoadedData
from fastcifar_jax.train import Diverged

CIFAR10_TRAIN = 50_000  # images
ALPHAS = (0.075, 0.3)  # of the CELUs in the ladder
DEFAULT_RUNS = (Path("runs"),)


@click.group()
def plot() -> None:
    """Draws figures of recipes, records and networks, as PNG or SVG."""


def _form(context: click.Context, parameter: click.Parameter, value: Path) -> Path:
    if value.suffix not in (".png", ".svg"):
        raise click.BadParameter(f"{value} must end with .png or .svg", context, parameter)
    return value


out_option = click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), required=True, callback=_form, help="A .png or .svg file."
)


@plot.command()
@click.argument("name", default="baseline")
@data_option
@limit_train_option
@set_option
@out_option
@click.pass_obj
def augmentations(context: CliContext, name: str, out: Path, **options: Any) -> None:
    """The first 8 training images, as stored and in the first two epochs of recipe NAME (default: baseline)."""
    recipe, loaded = _with_data(context, name, **options)
    count, epochs = min(8, loaded.info.train), (1, 2)
    with usage_errors(recipe.name):
        pictures = plot_data.augmented(recipe, loaded.dataset, count, epochs)
    titles = [loaded.info.classes[label] for label in loaded.dataset.train_labels[:count]]
    _save(out, figures.augmentations, loaded.dataset.train_images[:count], pictures, epochs, titles)


@plot.command()
@click.argument("name", default="final")
@click.option("--patch", type=click.IntRange(2, 3), default=3, show_default=True, help="Side of the patches, pixels.")
@data_option
@limit_train_option
@set_option
@out_option
@click.pass_obj
def whitening(context: CliContext, name: str, patch: int, out: Path, **options: Any) -> None:
    """The eigenvectors of image patches, from the images that recipe NAME (default: final) starts with."""
    recipe, loaded = _with_data(context, name, **options)
    _save(out, figures.whitening, plot_data.eigen_patches(recipe, loaded.dataset, patch), recipe)


@plot.command()
@out_option
def activations(out: Path) -> None:
    """The activations of the recipes, and their slopes."""
    celus = {f"CELU, alpha {alpha:g}": Celu(alpha) for alpha in ALPHAS}
    _save(out, figures.activations, {"ReLU": Relu(), **celus, "GELU": Gelu()})


@plot.command()
@click.argument("names", metavar="[NAME]...", nargs=-1)
@epochs_option
@set_option
@out_option
@click.pass_obj
def schedule(context: CliContext, names: Sequence[str], out: Path, **options: Any) -> None:
    """The learning rates of recipes (default: final) over a run on 50,000 images."""
    rates = {}
    for recipe, _ in _recipes(context, names or ("final",), **options):
        with usage_errors():
            steps_per_epoch = CIFAR10_TRAIN // recipe.batch_size
            rates[recipe.name] = plot_data.learning_rates(recipe, max(1, steps_per_epoch))
    _save(out, figures.schedules, rates)


@plot.command("bn-dynamics")
@click.argument("name", default="ghost_norm")
@data_option
@limit_train_option
@epochs_option
@width_option
@set_option
@out_option
@click.pass_obj
def bn_dynamics(context: CliContext, name: str, out: Path, **options: Any) -> None:
    """Trains recipe NAME (default: ghost_norm) and shows scales and biases of its norms after each epoch."""
    with usage_errors():
        backend.configure()
    recipe, loaded = _with_data(context, name, **options)
    records.make_folder(out.parent)
    console = report.make_console()
    on_epoch = lambda row: console.print(f"epoch {row.epoch}: training loss {row.train_loss:.4f}")
    try:
        with usage_errors():
            history = plot_data.norm_history(recipe, len(loaded.info.classes), loaded.dataset, on_epoch)
    except Diverged as error:
        raise click.ClickException(str(error)) from error
    title = f"{recipe.name}: the first 8 channels of each norm, {loaded.info.source}, seed 0"
    _save(out, figures.norms, history, title)


@plot.command()
@click.argument("paths", metavar="[RUNS]...", nargs=-1, type=click.Path(path_type=Path))
@out_option
def convergence(paths: Sequence[Path], out: Path) -> None:
    """Accuracy against epochs, from records of runs of several lengths: RUNS are folders or files (default: runs)."""
    with usage_errors():
        series = plot_data.lengths_of(plot_data.read_arms(paths or DEFAULT_RUNS))
    _save(out, run_figures.convergence, series)


@plot.command()
@click.argument("paths", metavar="[RUNS]...", nargs=-1, type=click.Path(path_type=Path))
@out_option
def curves(paths: Sequence[Path], out: Path) -> None:
    """Accuracy and loss by epoch, from records: RUNS are folders or files (default: runs)."""
    with usage_errors():
        arms = plot_data.read_arms(paths or DEFAULT_RUNS)
    _save(out, run_figures.curves, arms)


@plot.command()
@click.argument("name", default="final")
@width_option
@set_option
@out_option
@click.pass_obj
def network(context: CliContext, name: str, out: Path, **options: Any) -> None:
    """The network of recipe NAME (default: final) for images of 32x32 and 10 classes."""
    recipe, _ = _recipe(context, name, **options)
    with usage_errors():
        layers = layers_of(recipe.model(10, "float32"), recipe.name)
    _save(out, draw, layers, recipe.name)


def _recipes(
    context: CliContext, names: Sequence[str], *, assignments: Sequence[str], epochs=None, width=None
) -> list[tuple[Recipe, str]]:
    """The recipes, changed by the options, and their data by default."""
    with usage_errors():
        found = discover.resolve(names, context.folder)
        return [(change(each.recipe, assignments, epochs, width, None), each.data or "cifar10") for each in found]


def _recipe(context: CliContext, name: str, **options: Any) -> tuple[Recipe, str]:
    found = _recipes(context, (name,), **options)
    if len(found) > 1:
        raise click.UsageError(f"{name} stands for {len(found)} recipes; name one")
    return found[0]


def _with_data(
    context: CliContext, name: str, *, data: str | None, limit_train: int | None, **options: Any
) -> tuple[Recipe, LoadedData]:
    """One recipe, and the images that it would be trained on."""
    recipe, default = _recipe(context, name, **options)
    with usage_errors():
        source = data or os.environ.get("FASTCIFAR_DATA") or default
        return recipe, load_data(source, limit_train, report.make_console())


def _save(out: Path, figure: Callable, *arguments) -> None:
    files.write_bytes(out, render(figure, *arguments, form=out.suffix[1:]))
    click.echo(f"wrote {out}")
