"""The command that makes a run again."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import click
from rich.console import Console

from fastcifar_jax.analysis.compare import arm_name
from fastcifar_jax.cli import console as report
from fastcifar_jax.cli.options import CliContext, json_option, torch_twin, usage_errors
from fastcifar_jax.ops import backend
from fastcifar_jax.ops.backend import Driver
from fastcifar_jax.runs import experiments as discover
from fastcifar_jax.runs import records, reproduce
from fastcifar_jax.runs import runner as runs
from fastcifar_jax.runs.experiments import Experiment
from fastcifar_jax.runs.records import Record
from fastcifar_jax.runs.reproduce import DIFFERENT, TOLERANCE
from fastcifar_jax.runs.runner import RunSpec
from fastcifar_jax.train import check


@click.command("reproduce")
@click.argument("record", type=click.Path(path_type=Path))
@click.option("--data", metavar="SOURCE", help="Where the data are now; else where the record has them from.")
@click.option("--experiment", metavar="NAME", help="The recipe: a name that `list` shows, or the path of its file.")
@click.option(
    "--tolerance",
    type=click.FloatRange(0),
    default=TOLERANCE,
    show_default=True,
    metavar="POINTS",
    help="The most that an accuracy may differ by, in percentage points, and a loss, in percent.",
)
@json_option
@click.pass_obj
def reproduce_command(
    invocation: CliContext,
    record: Path,
    data: str | None,
    experiment: str | None,
    tolerance: float,
    json_path: Path | None,
) -> int:
    """Makes the run of RECORD, a file, again and says whether its numbers come out as they did.

    The recipe, seed, driver and number of training images are those on record, and so are the convolutions where they
    can be had here. The rerun is on one device and leaves no record. The exit status is 0 for numbers that are bitwise
    equal or equal within the tolerance, 1 for different ones, and 2 where nothing could be compared.

    Of a recipe's own Python file a record holds the name only, and no file is run because a record names it: give its
    path with --experiment.
    """
    console = report.make_console()
    with usage_errors():
        known = records.read(record)
        check_reproducible(known)
        with _convolutions_of(known):
            job = _job(known, experiment, data, invocation, console)
    with _convolutions_of(known):
        again = _run(job, known, invocation, console)
    answer = {
        "record": str(record),
        "experiment": known.experiment,
        "framework": known.framework,
        "recipe_hash": known.recipe_hash,
        "seed": known.seed,
        **reproduce.compare(known, again, tolerance),
    }
    reproduce.show(f"{job.arm}, seed {known.seed}", answer, console)
    if json_path:
        with usage_errors():
            records.write_text(json_path, records.dumps(answer))
    return int(answer["verdict"] == DIFFERENT)


def check_reproducible(record: Record) -> None:
    """Whether the run of a record can be made again and compared; a diverged one can.

    Raises:
      ValueError: it cannot; the message says why.
    """
    name = arm_name(record.framework, record.experiment)
    if record.status == "crashed":
        raise ValueError(
            f"the run of {name}, seed {record.seed}, crashed ({record.error}), so there are no results to compare "
            "with; `run` makes it again"
        )
    if record.framework not in ("jax", "torch"):
        raise ValueError(f"the record is of the framework {record.framework!r}; expected jax or torch")
    if record.driver not in get_args(Driver):
        raise ValueError(f"the record has the driver {record.driver!r}; expected one of {', '.join(get_args(Driver))}")
    if not 0 <= record.seed < 2**32:
        raise ValueError(f"the record has the seed {record.seed}; expected one from 0 to below 2**32")


def _experiment(record: Record, name: str | None, folder: Path | None) -> Experiment:
    """The declared recipe of a record; raises ValueError where there is none or more than one."""
    experiments = discover.resolve((name,), folder) if name else discover.find_experiments(folder)
    found = [one for one in experiments if one.recipe.name == record.experiment]
    if name and len(experiments) == 1:  # an experiment may have got another name: the hash decides
        found = experiments
    if len(found) != 1:
        files = sorted({text for text in map(str, record.command) if text.endswith(".py")})
        where = f"; its command names {', '.join(files)}" if files else ""
        raise ValueError(
            f"{len(found)} recipes are called {record.experiment!r} here{where}; name the record's with --experiment, "
            "which takes the path of a Python file too"
        )
    return found[0]


def _job(record: Record, name: str | None, source: str | None, invocation: CliContext, console: Console) -> RunSpec:
    backend.configure_cpu()  # before anything asks JAX for a device
    experiment = _experiment(record, name, invocation.folder)
    recipe = reproduce.rebuild(experiment.recipe, record)
    twin = torch_twin() if record.framework == "torch" else None
    with usage_errors("" if source else "the data of the record (--data names others)"):
        data = runs.load_data(source or record.data["source"], record.data["train"], console)
    check(recipe, len(data.info.classes), data.dataset)
    if twin:
        twin.make_train(recipe, len(data.info.classes))
    return RunSpec(arm_name(record.framework, recipe.name), recipe, experiment.path, False, data, twin)


def _run(job: RunSpec, known: Record, invocation: CliContext, console: Console) -> Record:
    ended: list[Record] = []
    with tempfile.TemporaryDirectory() as folder:
        driver: Driver = "scan" if known.driver == "scan" else "python"
        run = runs.make_runner(job, ended, console, Path(folder), driver, invocation.arguments)
        run(known.seed)
    return ended[0]


@contextlib.contextmanager
def _convolutions_of(record: Record) -> Iterator[None]:
    """With the record's way of convolutions, unless the user forces one.

    oneDNN is not forced: where the trial has found it wanting, it could end the process.
    """
    forced = record.conv == "lax" and not os.environ.get("FASTCIFAR_CONV")
    if forced:
        os.environ["FASTCIFAR_CONV"] = "lax"
    try:
        yield
    finally:
        if forced:
            del os.environ["FASTCIFAR_CONV"]
