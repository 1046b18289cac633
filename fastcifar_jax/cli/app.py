"""The command line: `main`, and the commands that show what there is."""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import click

from fastcifar_jax.cli import console as view
from fastcifar_jax.cli.bench import bench_command
from fastcifar_jax.cli.compare import compare, match_epochs
from fastcifar_jax.cli.doctor import doctor
from fastcifar_jax.cli.models import evaluate, predict
from fastcifar_jax.cli.options import CliContext, usage_errors
from fastcifar_jax.cli.plot import plot
from fastcifar_jax.cli.report import report_command
from fastcifar_jax.cli.reproduce import reproduce_command
from fastcifar_jax.cli.run import run
from fastcifar_jax.runs import experiments
from fastcifar_jax.runs.records import RecordError

RENAMED = {
    "--again": "--rerun",
    "--wish": "--min-effect",
    "--anyway": "--allow-different-data",
    "--until": "--until-half-width",
    "--previous": "--against-previous",
    "--equivalence": "--equivalence-margin",
    "--driver": "",
    "--strategy": "",
    "trade": "match-epochs",
    "plot celu": "plot activations",
}


def main(argv: Sequence[str] | None = None, folder: Path | None = None) -> NoReturn:
    """Runs a command and exits: 0 done, 1 a run diverged or crashed, 2 bad names or values, 130 interrupted.

    Args:
      argv: the arguments; None for those of the process.
      folder: a package of modules with RECIPES; None for the package `experiments` where it can be imported.
    """
    arguments = tuple(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("fastcifar_jax").setLevel(logging.INFO)
    program = f"python -m {folder.name if folder else 'fastcifar_jax'}"
    context = CliContext(folder or experiments.default_folder(), arguments)
    try:
        refuse_old_names(arguments)
        status = commands.main(arguments or ("--help",), program, standalone_mode=False, obj=context)
    except click.Abort:
        status = _error("interrupted", 130)
    except click.ClickException as error:
        status = _error(error.format_message(), 2)
    except RecordError as error:
        status = _error(str(error), 1)
    sys.exit(status or 0)


def refuse_old_names(arguments: Sequence[str]) -> None:
    """Refuses what was renamed, with the new name.

    Raises:
      click.UsageError: an old option or command.
    """
    given = [argument.partition("=")[0] for argument in arguments]
    names = {*(name for name in given if name.startswith("--")), given[0] if given else "", " ".join(given[:2])}
    for old in RENAMED.keys() & names:
        advice = f"use {RENAMED[old]}" if RENAMED[old] else "leave it out: there is one training loop now"
        raise click.UsageError(f"{old} is not used any more; {advice}")


def _error(message: str, status: int) -> int:
    print("error:", " ".join(message.split()), file=sys.stderr)
    return status


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def commands() -> None:
    """Trains and compares recipes for CIFAR-10."""


@commands.command("list")
@click.option("--all", "everything", is_flag=True, help="Also ablations and transfers of single tricks.")
@click.pass_obj
def list_command(context: CliContext, everything: bool) -> None:
    """Shows the experiments with their epochs and their published accuracy and time."""
    with usage_errors():
        found = experiments.find_experiments(context.folder)
    console = view.make_console()
    shown = [experiment for experiment in found if everything or experiment.listed]
    for title in dict.fromkeys(experiment.title for experiment in shown):
        console.print(title, style="bold")
        console.print(view.ladder([experiment.recipe for experiment in shown if experiment.title == title]))
    console.print("published: mean test accuracy of that many runs, TTA with test-time augmentation; time: of training")
    if len(shown) < len(found):
        console.print(f"{len(found) - len(shown)} ablations and transfers are not shown; --all shows them")


@commands.command()
@click.argument("name")
@click.pass_obj
def show(context: CliContext, name: str) -> None:
    """Shows the whole recipe NAME, its difference from its predecessor, its parameters and MACs."""
    console = view.make_console()
    with usage_errors():
        for experiment in experiments.resolve((name,), context.folder):
            for part in view.details(experiment.recipe, experiment.predecessor):
                console.print(part)


for command in (
    run, compare, match_epochs, bench_command, plot, predict, evaluate, report_command, reproduce_command, doctor,
):  # fmt: skip
    commands.add_command(command)
