"""The commands; knows where experiments are found, nothing about any of them."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

import click

from fastcifar_jax.cli import console as report
from fastcifar_jax.cli.bench import bench_command
from fastcifar_jax.cli.compare import compare, match_epochs
from fastcifar_jax.cli.models import evaluate, predict
from fastcifar_jax.cli.options import (
    CliContext,
    RunOptions,
    make_jobs,
    run_options,
    seeds_option,
    usage_errors,
)
from fastcifar_jax.cli.plot import plot
from fastcifar_jax.cli.report import report_command
from fastcifar_jax.cli.reproduce import reproduce_command
from fastcifar_jax.ops import backend
from fastcifar_jax.ops.backend import default_driver, default_dtype
from fastcifar_jax.parallel import hosts
from fastcifar_jax.parallel.mesh import Strategy, make_mesh
from fastcifar_jax.runs import experiments as discover
from fastcifar_jax.runs import logging as live
from fastcifar_jax.runs import records
from fastcifar_jax.runs import runner as runs
from fastcifar_jax.runs import saved_model as saved
from fastcifar_jax.runs.records import Record, RecordError
from fastcifar_jax.runs.together import Refused, run_together


def main(argv: Sequence[str] | None = None, folder: Path | None = None) -> NoReturn:
    """Runs a command and exits: 0 done, 1 a run that diverged or crashed, 2 bad names or values, 130 interrupted.

    Args:
      argv: the arguments; those of the process when None.
      folder: a package of modules with RECIPES; None takes the package `experiments` where it can be imported.
    """
    arguments = tuple(sys.argv[1:] if argv is None else argv)
    program = f"python -m {folder.name if folder else 'fastcifar_jax'}"
    invocation = CliContext(folder or discover.default_folder(), arguments)
    try:
        status = commands.main(arguments or ("--help",), program, standalone_mode=False, obj=invocation)
    except click.Abort:
        status = _error("interrupted", 130)
    except click.ClickException as error:
        status = _error(error.format_message(), 2)
    except RecordError as error:
        status = _error(str(error), 1)
    sys.exit(status or 0)


def _error(message: str, status: int) -> int:
    print("error:", " ".join(message.split()), file=sys.stderr)
    return status


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def commands() -> None:
    """Trains and compares recipes for CIFAR-10."""


@commands.command("list")
@click.pass_obj
def list_command(invocation: CliContext) -> None:
    """Shows every experiment with its epochs and its published accuracy and time."""
    with usage_errors():
        experiments = discover.find_experiments(invocation.folder)
    console = report.make_console()
    for title in dict.fromkeys(experiment.title for experiment in experiments):
        console.print(title, style="bold", soft_wrap=True)
        console.print(report.ladder([e.recipe for e in experiments if e.title == title]))
    console.print("published: mean test accuracy of so many runs, TTA with test-time augmentation; time: of training")


@commands.command()
@click.argument("name")
@click.pass_obj
def show(invocation: CliContext, name: str) -> None:
    """Shows the whole recipe NAME, its difference from its predecessor, its parameters and MACs."""
    console = report.make_console()
    with usage_errors():
        for experiment in discover.resolve((name,), invocation.folder):
            for part in report.details(experiment.recipe, experiment.predecessor):
                console.print(part, soft_wrap=isinstance(part, str))


def _mesh(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """ "4" is (4, 1) and "4x2" is (4, 2)."""
    if value is None:
        return None
    sizes = value.split("x")
    if len(sizes) > 2 or not all(size.isdecimal() for size in sizes):
        raise click.BadParameter(f"{value!r} is no mesh; give devices for seeds, as in 8, or 4x2", context, parameter)
    return int(sizes[0]), int(sizes[1]) if len(sizes) > 1 else 1


@commands.command()
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@seeds_option("1")
@click.option("--strategy", type=click.Choice(get_args(Strategy)), help="What a device does with several seeds.")
@click.option("--mesh", callback=_mesh, metavar="SEEDS[xBATCH]", help="Devices: 8 for so many seeds at once; 4x2.")
@click.option("--distributed", is_flag=True, help="This is one of several processes; see docs/scaling.md.")
@click.option("--save", is_flag=True, help="Also keep the trained models, beside their records.")
@click.option("--log", type=click.Choice(("tensorboard",)), help="Also write epochs to OUT/tensorboard as they end.")
@run_options
@click.pass_obj
def run(
    invocation: CliContext,
    names: tuple[str, ...],
    seeds: range,
    strategy: Strategy | None,
    mesh: tuple[int, int] | None,
    distributed: bool,
    save: bool,
    log: str | None,
    options: RunOptions,
) -> int:
    """Trains recipes: NAME is one that `list` shows, or the path of a Python file with a RECIPE or RECIPES.

    Every seed leaves a record under --out; those that have one are skipped. torch:NAME trains in PyTorch.
    Seeds run one after another on one device unless --strategy, --mesh or --distributed says otherwise.
    """
    console = report.make_console()
    together = bool(strategy or mesh or distributed)
    for option, given in (("--checkpoint", options.checkpoint), ("--save", save), ("--log", log)):
        if together and given:
            raise click.UsageError(
                f"{option} is for one seed after another; leave it out, or --strategy, --mesh and --distributed"
            )
    if distributed:
        with usage_errors():
            backend.keep_freed_memory()  # before JAX starts its threads
            hosts.initialize()
        console.quiet = not hosts.writes_records()
    jobs, driver = make_jobs(invocation, names, options, console)
    if together and any(job.twin for job in jobs.values()):
        raise click.UsageError("torch: arms train one seed after another; leave out --strategy, --mesh, --distributed")
    if save and any(job.twin for job in jobs.values()):
        raise click.UsageError("torch: arms cannot be saved; leave out --save, or run them by themselves")
    writes = hosts.writes_records()
    with usage_errors():
        for job in jobs.values() if save else ():
            saved.check(job.recipe, job.data.info, job.data.dataset)
        known = {  # a damaged record is found before anything is trained
            (job.framework, job.recipe.hash, seed)
            for job in jobs.values()
            for seed in seeds
            if writes and not options.rerun and runs.on_record(job, options.out, seed, save)
        }
        devices = make_mesh(*(mesh or (None, 1))) if together else None
        write_live = live.tensorboard(options.out / "tensorboard") if log else None
        if writes:
            runs.make_folders(jobs.values(), options.out)
    ended: list[Record] = []
    interrupted = ""
    common: dict[str, Any] = {
        "console": console,
        "out": options.out,
        "driver": driver,
        "arguments": invocation.arguments,
        "rerun": options.rerun,
        "compiled": {},
    }
    try:
        for job in jobs.values():
            before = len(ended)
            if devices is not None:
                try:
                    run_together(job, seeds, ended, strategy=strategy or "loop", mesh=devices, **common)
                except Refused as error:
                    raise click.UsageError(str(error)) from error
            else:
                runner = runs.make_runner(
                    job, ended, checkpoints=options.checkpoint, save=save, log=write_live, **common
                )
                for seed in seeds:
                    runner(seed)
            finished = [record for record in ended[before:] if record.status == "finished"]
            if len(finished) > 1:
                console.print(report.seeds_line(job.arm, finished), soft_wrap=True)
            if job.matches_published and job.recipe.published.accuracy is not None:
                console.print(report.published_line(job.recipe), soft_wrap=True)
    except KeyboardInterrupt:
        interrupted = "interrupted: "
    finally:
        skipped = sum((record.framework, record.recipe_hash, record.seed) in known for record in ended)
        counts = report.counts_line(ended, len(jobs) * len(seeds), skipped)
        console.print(f"{interrupted}{counts}; records in {options.out}", soft_wrap=True)
    return 130 if interrupted else int(any(record.status == "diverged" for record in ended))


@commands.command()
def doctor() -> None:
    """Tells what runs are made with here, and why."""
    console = report.make_console()
    with usage_errors():
        conv, reason = backend.conv_backend()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    lines = {
        "device": report.device_text(records.device()),
        "memory": f"{memory / 2**30:.1f} GiB" if memory else "unknown",
        "versions": ", ".join(f"{name} {version}" for name, version in records.versions().items()),
        "convolutions": f"{conv}: {reason}",
        "driver": default_driver(),
        "dtype": default_dtype(),
        "data": os.environ.get("FASTCIFAR_DATA") or "cifar10 (FASTCIFAR_DATA is not set)",
    }
    for name, text in lines.items():
        console.print(f"{name:>12}: {text}", soft_wrap=True)


commands.add_command(bench_command)
commands.add_command(compare)
commands.add_command(match_epochs)
commands.add_command(plot)
commands.add_command(predict)
commands.add_command(evaluate)
commands.add_command(report_command)
commands.add_command(reproduce_command)
