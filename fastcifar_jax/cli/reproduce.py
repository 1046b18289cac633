"""The command that repeats a run from its record."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from fastcifar_jax.analysis.compare import arm_name
from fastcifar_jax.cli import console as view
from fastcifar_jax.cli.options import CliContext, checked, json_option, load_data, twin_of, usage_errors, write_json
from fastcifar_jax.ops import backend
from fastcifar_jax.runs import experiments, records
from fastcifar_jax.runs.experiments import Experiment
from fastcifar_jax.runs.records import Record
from fastcifar_jax.runs.reproduce import DIFFERENT, TOLERANCE, compare_rerun, recipe_of
from fastcifar_jax.runs.runner import RunSettings, RunSpec, record_of, run_all


@click.command("reproduce")
@click.argument("record", type=click.Path(path_type=Path))
@click.option("--data", metavar="SOURCE", help="Where the data are now; the source in the record by default.")
@click.option("--experiment", metavar="NAME", help="The recipe: a name that `list` shows, or the path of its file.")
@click.option(
    "--tolerance", type=click.FloatRange(0), default=TOLERANCE, show_default=True, metavar="POINTS",
    help="Largest difference: in percentage points for accuracies, in per cent for losses.",
)  # fmt: skip
@json_option
@click.pass_obj
def reproduce_command(
    context: CliContext,
    record: Path,
    data: str | None,
    experiment: str | None,
    tolerance: float,
    json_path: Path | None,
) -> int:
    """Repeats the run of RECORD, a file, and compares its numbers with those on record.

    The recipe, the seed and the number of training images are those of the record, and so is the convolution backend
    if it is available. The rerun uses one device and leaves no record. The exit status is 0 if the numbers are bitwise
    equal or equal within the tolerance, 1 if they differ, and 2 if nothing could be compared.

    A record holds only the name of a recipe's own Python file, and no file is executed because a record names it: give
    its path with --experiment.
    """
    console = view.make_console()
    with usage_errors():
        existing = records.read(record)
        check_reproducible(existing)
    with _conv_backend_of(existing):
        with usage_errors():
            spec = _run_spec(existing, experiment, data, context, console)
        tta_every_epoch = all(row.tta_loss is not None for row in existing.epochs[:-1])
        rerun = _run(spec, existing.seed, tta_every_epoch, context, console)
    named = {name: getattr(existing, name) for name in ("experiment", "framework", "recipe_hash", "seed")}
    answer = {"record": str(record), **named, **compare_rerun(existing, rerun, tolerance)}
    made = existing.provenance
    in_any_order = made.device["platform"] == "gpu" and backend.DETERMINISTIC not in str(made.settings.get("XLA_FLAGS"))
    show_rerun(f"{spec.arm}, seed {existing.seed}", answer, console, in_any_order)
    with usage_errors():
        write_json(json_path, answer)
    return int(answer["verdict"] == DIFFERENT)


def check_reproducible(record: Record) -> None:
    """Checks that the run of a record can be repeated and compared; a diverged run can.

    Raises:
      ValueError: it cannot; the message says why.
    """
    if record.status == "crashed":
        raise ValueError(
            f"the run of {arm_name(record.framework, record.experiment)}, seed {record.seed}, crashed "
            f"({record.error}), so there are no results to compare with; `run` repeats it"
        )
    if not 0 <= record.seed < 2**32:
        raise ValueError(f"the record has the seed {record.seed}; expected 0 to 2**32 - 1")


def show_rerun(label: str, answer: dict[str, Any], console: Console, in_any_order: bool = False) -> None:
    """Prints the answer of `compare_rerun` for the run called `label`, whose sums may have been added in any order."""
    count, largest, tolerance = answer["numbers"], answer["largest"], answer["tolerance"]
    changed = [(name, *answer[name]) for name in ("status", "epochs") if answer[name][0] != answer[name][1]]
    parts = [f"{old} {name} on record, {new} now".replace(" status", "") for name, old, new in changed]
    if answer["first_epoch"] is None:
        parts.append(f"{count} losses and accuracies of {min(answer['epochs'])} epochs are the same to the last bit")
    else:
        parts.append(
            f"of {count} numbers, accuracies differ by up to {largest['accuracy']:.4g} pp and losses by up to "
            f"{largest['loss']:.4g} % ({largest['absolute_loss']:.4g}), from epoch {answer['first_epoch']} on; the "
            f"tolerance is {tolerance:g} pp and {tolerance:g} %"
        )
    console.print(f"{label}: {answer['verdict']}: {'; '.join(parts)}")
    if in_any_order:
        console.print("sums on this GPU have no fixed order, so only the tolerance counts; see --deterministic of run")
    if not answer["provenance_diff"]:
        console.print("same provenance: versions, device, data, source code, convolution backend and settings")
        return
    table = view.make_table(("different provenance", "on record", "now"))
    for name, pair in answer["provenance_diff"].items():
        table.add_row(name, *("" if value is None else str(value) for value in pair))
    console.print(table)


def _find_experiment(record: Record, name: str | None, folder: Path | None) -> Experiment:
    """The declared recipe of a record; raises ValueError unless there is exactly one."""
    declared = experiments.resolve((name,), folder) if name else experiments.find_experiments(folder)
    found = [one for one in declared if one.recipe.name == record.experiment]
    if name and len(declared) == 1:  # an experiment may have been renamed: the hash decides
        found = declared
    if len(found) != 1:
        named = sorted({text for text in record.command if text.endswith(".py")})
        where = f"; its command names {', '.join(named)}" if named else ""
        raise ValueError(
            f"{len(found)} recipes here are called {record.experiment!r}{where}; give the record's recipe with "
            "--experiment, by name or by the path of a Python file"
        )
    return found[0]


def _run_spec(record: Record, name: str | None, source: str | None, context: CliContext, console: Console) -> RunSpec:
    flags = str(record.provenance.settings.get("XLA_FLAGS"))
    backend.configure(backend.DETERMINISTIC in flags)  # before anything asks JAX for a device
    experiment = _find_experiment(record, name, context.folder)
    recipe = recipe_of(record, experiment.recipe)
    twin, recorded = twin_of(record.framework), record.provenance.data
    with usage_errors("" if source else "the data of the record (--data names others)"):
        data = load_data(source or recorded["source"], recorded["train"], console)
    return checked(RunSpec(arm_name(record.framework, recipe.name), recipe, experiment.path, False, data, twin))


def _run(spec: RunSpec, seed: int, tta_every_epoch: bool, context: CliContext, console: Console) -> Record:
    with tempfile.TemporaryDirectory() as folder:
        settings = RunSettings(Path(folder), context.arguments, tta_every_epoch=tta_every_epoch)
        shown = view.RunView(console)
        *_, last = map(record_of, shown.show(run_all([spec], [seed], settings, {}, shown.on_steps)))
    assert last is not None  # the last event of a run brings its record
    return last


@contextlib.contextmanager
def _conv_backend_of(record: Record) -> Iterator[None]:
    """Uses `lax` if the record did, unless the user chose a backend.

    oneDNN is not forced: where its check has failed, it could end the process.
    """
    force = record.provenance.conv == "lax" and not os.environ.get("FASTCIFAR_CONV")
    if force:
        os.environ["FASTCIFAR_CONV"] = "lax"
    try:
        yield
    finally:
        if force:
            del os.environ["FASTCIFAR_CONV"]
