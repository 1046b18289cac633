"""The command that times training steps."""

import json
import os
import statistics
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from fastcifar_jax.cli import console as view
from fastcifar_jax.cli.options import (
    CliContext,
    data_option,
    json_option,
    limit_train_option,
    load_data,
    set_option,
    usage_errors,
    width_option,
)
from fastcifar_jax.functions import check_trainable
from fastcifar_jax.models.base import PRECISIONS
from fastcifar_jax.ops.backend import default_dtype
from fastcifar_jax.recipe import change
from fastcifar_jax.runs import bench, experiments, files


@click.command("bench")
@click.argument("names", metavar="[NAME...]", nargs=-1)
@click.option("--against", type=click.Choice(("torch",)), help="Also time the recipe in PyTorch (extra: compare).")
@data_option
@limit_train_option
@width_option
@click.option(
    "--dtype", "dtypes", multiple=True, type=click.Choice(tuple(PRECISIONS)), help="Repeats; default by platform."
)
@set_option
@click.option("--rounds", type=click.IntRange(bench.MIN_ROUNDS), default=7, show_default=True)
@json_option
@click.pass_obj
def bench_command(context: CliContext, names: tuple[str, ...], json_path: Path | None, **options: Any) -> None:
    """Times whole training steps of recipes, final and baseline by default, and PyTorch's in the same rounds."""
    console = view.make_console()
    tasks = []
    with usage_errors():
        for experiment in experiments.resolve(names or ("final", "baseline"), context.folder):
            with usage_errors(experiment.recipe.name):
                recipe = change(experiment.recipe, options["assignments"], None, options["width"], None)
            source = options["data"] or os.environ.get("FASTCIFAR_DATA") or experiment.data or "cifar10"
            loaded = load_data(source, options["limit_train"], console)
            num_classes = len(loaded.info.classes)
            with usage_errors(recipe.name):
                check_trainable(recipe, num_classes, loaded.dataset)
            del loaded  # the workers load it themselves
            task = {
                "experiment": experiment.recipe.name,
                "path": str(experiment.path),
                "folder": str(context.folder) if context.folder else None,
                "data": source,
                "limit_train": options["limit_train"],
                "width": options["width"],
                "set": options["assignments"],
            }
            tasks.append((task, recipe, view.size_of(recipe, num_classes).macs))
    found = []
    dtypes, against, rounds = options["dtypes"] or default_dtype()[:1], bool(options["against"]), options["rounds"]
    for task, recipe, macs in tasks:
        try:
            found.append(bench.run_bench(task, recipe, macs, dtypes, against, rounds, console.print))
        except bench.BenchError as error:
            raise click.ClickException(f"{recipe.name}: {error}") from error
        show_bench(found[-1], console)
    if json_path:
        files.write_text(json_path, json.dumps(found, indent=1) + "\n")


def show_bench(answer: dict[str, Any], console: Console) -> None:
    """Prints the answer of `bench.run_bench` as tables."""
    title = f"{answer['experiment']}, batch {answer['batch_size']}, {view.device_text(answer['device'])}"
    console.print(f"{title}: median of {answer['rounds']} interleaved steps")
    columns = ("images/s", "s per step", "spread", "compile s", "peak GB")
    table = view.make_table(("",), columns)
    for name, result in sorted(answer["contenders"].items(), key=lambda item: -item[1]["images_per_second"]):
        seconds = result["seconds"]
        table.add_row(
            name, f"{result['images_per_second']:,.0f}", f"{statistics.median(seconds):.3f}",
            f"{min(seconds):.3f}-{max(seconds):.3f}", f"{result['compile_seconds']:.1f}",
            f"{result['peak_bytes'] / 1e9:.1f}",
        )  # fmt: skip
    console.print(table)
    if r := answer["ratio"]:
        console.print(f"{r['jax']} / {r['torch']}: {r['median']:.2f} ({r['least']:.2f} to {r['largest']:.2f})")
    table = view.make_table(("convolution", "shape"), [f"{name} GFLOP/s" for name in bench.PASSES])
    for name, layer in answer["layers"].items():
        table.add_row(name, layer["shape"], *(f"{layer[one]:,.0f}" for one in bench.PASSES))
    console.print(table)
    console.print(
        f"one large product: {answer['ceiling']:,.0f} GFLOP/s; the step reaches {answer['share_of_ceiling']:.0%} of "
        "the speed that its convolutions would have at that rate"
    )
