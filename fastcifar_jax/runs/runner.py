"""Runs of recipes by either framework: trained, shown and put on record, a seed at a time."""

import dataclasses
import datetime
import functools
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import jax
import numpy as np
from rich.console import Console

from fastcifar_jax.cli import console as report
from fastcifar_jax.data.load import DataInfo, load
from fastcifar_jax.ops import backend
from fastcifar_jax.recipe import Recipe, flatten
from fastcifar_jax.runs import checkpoint, records
from fastcifar_jax.runs import saved_model as saved
from fastcifar_jax.runs.logging import Log
from fastcifar_jax.runs.records import Record, RecordError
from fastcifar_jax.train import CompiledRun, Diverged, Driver, eval_variables, make_functions, make_train, shapes_of
from fastcifar_jax.types import Dataset, EpochInfo, RunResult, Snapshot, TrainState

Train = Callable[..., RunResult]  # (seed, on_epoch, on_step, on_compiled), in JAX with resume and on_snapshot


class LoadedData(NamedTuple):
    """A data set on the device."""

    dataset: Dataset
    info: DataInfo
    transfer_seconds: float


class RunSpec(NamedTuple):
    """One recipe with its data, and the framework that trains it."""

    arm: str  # "final", "torch:final", "final optim.peak_lr=0.8"
    recipe: Recipe
    path: Path  # of the experiment's file
    matches_published: bool  # the declared recipe on the data that the published figures are of
    data: LoadedData
    twin: ModuleType | None = None  # trains in PyTorch; None for JAX

    @property
    def framework(self) -> str:
        """ "jax" or "torch"."""
        return "torch" if self.twin else "jax"


def load_data(source: str, limit_train: int | None, console: Console) -> LoadedData:
    """Loads a data set and puts it on the device.

    Raises:
      DataError: it cannot be had.
    """
    console.print(f"loading {source}", soft_wrap=True)
    dataset, info = load(source, limit_train=limit_train)
    text = report.device_text(records.device())  # starts the device too, which is no part of the transfer
    start = time.perf_counter()
    dataset = jax.block_until_ready(jax.device_put(dataset))
    seconds = time.perf_counter() - start
    console.print(
        f"{source}: {info.train:,} training and {info.test:,} test images, {len(info.classes)} classes; "
        f"{seconds:.2f} s to the device: {text}",
        soft_wrap=True,
    )
    return LoadedData(dataset, info, seconds)


def make_folders(jobs: Iterable[RunSpec], out: Path) -> None:
    """Makes the folders of the jobs' records.

    Raises:
      RecordError: one cannot be made or written to.
    """
    for job in jobs:
        records.make_folder(_path_of(job, out, 0).parent)


def on_record(job: RunSpec, out: Path, seed: int, save: bool = False) -> Record | None:
    """The record of a run that need not be repeated: the same seed diverges again, but may not crash again.

    With `save` a finished run counts only if its model was saved too.
    """
    path = _path_of(job, out, seed)
    record = records.read(path) if path.exists() else None
    if save and record and record.status == "finished" and not path.with_suffix(saved.SUFFIX).exists():
        return None
    return record if record and record.status != "crashed" else None


def make_runner(
    job: RunSpec,
    ended: list[Record],
    console: Console,
    out: Path,
    driver: Driver,
    arguments: tuple[str, ...],
    *,
    rerun: bool = False,
    checkpoints: bool = False,
    save: bool = False,
    log: Log | None = None,
    compiled: dict[tuple, CompiledRun] | None = None,
) -> Callable[[int], Record]:
    """The runs of one recipe, which compile once.

    Args:
      job: what to run.
      ended: gets the record of each seed as it ends, so that an interruption or a crash loses none.
      console: where to show it.
      out: folder of the records.
      driver: of JAX's training loop.
      arguments: of the command, for the record.
      rerun: whether to run what is on record as well.
      checkpoints: whether to save the state after every epoch, and to go on from what a killed run saved. JAX only.
      save: whether to save the trained model beside the record. JAX only.
      log: is told of every epoch as well.
      compiled: programs that the recipes of a sweep share.

    Returns:
      `run(seed)`: the record of that seed, which is on file when it returns. It raises RecordError for a record that
      cannot be written, and whatever a crashed run raised after its record is written. A diverged run is no exception.
    """
    recipe, info = job.recipe, job.data.info
    train = _trainer(job, driver, compiled)
    new = new_record(job, driver, arguments)
    each_step = backend.can_sync_each_step()
    compiles = True

    def run(seed: int) -> Record:
        nonlocal compiles
        known = None if rerun else on_record(job, out, seed, save)
        if known is not None:
            show_known(job, known, new, console)
            ended.append(known)
            return known
        label = f"{job.arm}, seed {seed}"
        of_seed, state_file = dataclasses.replace(new, seed=seed), checkpoint.path_of(_path_of(job, out, seed))
        say = lambda text: console.print(f"{label}: {text}", soft_wrap=True)
        resume = on_snapshot = None
        if checkpoints:
            resume, on_snapshot = checkpoint.keep(state_file, of_seed, lambda: _shapes_of_state(job), say)
        save_model = (lambda run: _save_model(job, out, seed, run)) if save else None
        with report.watch(console, label, recipe, info.train, compiles=compiles, each_step=each_step) as watching:
            show, on_step, on_compiled = watching
            on_epoch = show if log is None else _both(show, functools.partial(log, label))
            record, failure = _train_seed(
                of_seed, train, job.data, on_epoch, on_step, on_compiled, resume, on_snapshot, save_model
            )
        compiles = False
        try:
            records.write(record, out, tta=recipe.published.tta)
        except RecordError as error:
            if failure is None:
                raise
            failure.add_note(str(error))
        if record.status != "crashed":
            checkpoint.remove(state_file)
        ended.append(record)
        console.print(report.seed_line(job.arm, record), soft_wrap=True)
        if failure is not None:
            raise failure
        return record

    return run


def run_in_turn(runners: dict[str, Callable[[int], Record]], seeds: Iterable[int]) -> dict[str, list[Record]]:
    """The records of several recipes, seed by seed and with the order turned each time: A B, B A, A B, ...

    A machine that slows down, or a driver that is updated overnight, then meets all of them alike.
    """
    ended: dict[str, list[Record]] = {name: [] for name in runners}
    for i, seed in enumerate(seeds):
        for name in list(runners)[:: 1 if i % 2 == 0 else -1]:
            ended[name].append(runners[name](seed))
    return ended


def _path_of(job: RunSpec, out: Path, seed: int) -> Path:
    return records.path_of(out, job.framework, job.recipe.name, job.recipe.hash, job.data.info.hash, seed)


def _save_model(job: RunSpec, out: Path, seed: int, run: RunResult) -> None:
    assert run.state is not None  # it is kept where seeds are trained one after another
    accuracies = run.epochs[-1].test_accuracy, run.epochs[-1].tta_accuracy
    model = saved.of_run(job.recipe, job.data.info, job.data.dataset, seed, eval_variables(run.state), accuracies)
    saved.write(model, _path_of(job, out, seed).with_suffix(saved.SUFFIX))


def _shapes_of_state(job: RunSpec) -> TrainState:
    functions = make_functions(job.recipe, len(job.data.info.classes), job.data.info.train)
    return shapes_of(functions, job.recipe, job.data.dataset).state


def new_record(job: RunSpec, driver: Driver, arguments: tuple[str, ...]) -> Record:
    """What is known of a run before it starts."""
    recipe, info = job.recipe, job.data.info
    return Record(
        experiment=recipe.name,
        framework=job.framework,
        recipe=flatten(recipe),
        recipe_repr=repr(recipe),
        recipe_hash=recipe.hash,
        seed=0,
        status="crashed",
        error=None,
        data={"source": info.source, "hash": info.hash, "train": info.train, "test": info.test},
        device=records.device(),
        versions={**records.versions(), **(job.twin.versions() if job.twin else {})},
        source_hash=records.source_hash(job.path),
        conv="torch" if job.twin else backend.conv_backend()[0],
        driver="python" if job.twin else driver,
        command=arguments,
        started="",
        epochs=(),
        result=None,
    )


def _trainer(job: RunSpec, driver: Driver, compiled: dict[tuple, CompiledRun] | None) -> Train:
    num_classes = len(job.data.info.classes)
    if job.twin is None:
        train = make_train(job.recipe, num_classes, driver, compiled)
        return lambda seed, *callbacks, **kept: train(jax.random.key(seed), job.data.dataset, *callbacks, **kept)
    train_torch = job.twin.make_train(job.recipe, num_classes)
    arrays = Dataset._make(np.asarray(array) for array in job.data.dataset)

    def train_and_show(seed, on_epoch, on_step, on_compiled):
        run = train_torch(seed, arrays)
        on_compiled(run.compile_seconds)
        for row in run.epochs:
            on_epoch(row)
        return run

    return train_and_show


def _provenance_diff(known: Record, new: Record) -> list[str]:
    """What differs in the making of two records of one run."""
    fields = {"source code": "source_hash"} | {name: name for name in ("device", "driver", "strategy", "mesh")}
    return [text for text, name in fields.items() if getattr(known, name) != getattr(new, name)]


def show_known(job: RunSpec, known: Record, new: Record, console: Console) -> None:
    """Says that a run is on record, and what made it otherwise than `new` would be made."""
    other = "".join(f", by another {name}" for name in _provenance_diff(known, new))
    console.print(f"{report.seed_line(job.arm, known)} (on record{other}; --rerun repeats it)", soft_wrap=True)


def _both(first: report.OnEpoch, second: report.OnEpoch) -> report.OnEpoch:
    def on_epoch(row):
        first(row)
        second(row)

    return on_epoch


def _train_seed(
    new: Record,
    train: Train,
    data: LoadedData,
    on_epoch: report.OnEpoch,
    on_step: report.OnStep | None,
    on_compiled: report.OnCompiled,
    resume: Snapshot | None = None,
    on_snapshot: Callable[[Snapshot], None] | None = None,
    save: Callable[[RunResult], None] | None = None,
) -> tuple[Record, Exception | None]:
    """The record of one run, and the exception of a run that crashed."""
    rows = []

    def on_epoch_kept(row):
        rows.append(row)
        on_epoch(row)

    new = dataclasses.replace(new, started=now())
    for row in resume.epochs if resume else ():
        on_epoch_kept(row)
    kept = {"resume": resume, "on_snapshot": on_snapshot} if on_snapshot else {}
    try:
        run = train(new.seed, on_epoch_kept, on_step, on_compiled, **kept)
    except Diverged as error:
        return diverged(new, error), None
    except Exception as error:
        return crashed(new, error, rows), error
    if save is not None:
        save(run)
    return finished(new, run, data), None


def now() -> str:
    """UTC, ISO 8601, in seconds."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def diverged(new: Record, error: Diverged) -> Record:
    """The record of a run whose loss was not finite."""
    return dataclasses.replace(new, status="diverged", error=str(error), epochs=error.epochs)


def crashed(new: Record, error: Exception, rows: Iterable[EpochInfo]) -> Record:
    """The record of a run that an exception ended after `rows`."""
    message = f"{type(error).__name__}: {error}"
    return dataclasses.replace(new, status="crashed", error=message, epochs=tuple(rows))


def finished(new: Record, run: RunResult, data: LoadedData) -> Record:
    """The record of a run that came to its end."""
    result = {
        "test_accuracy": run.epochs[-1].test_accuracy,
        "tta_accuracy": run.epochs[-1].tta_accuracy,
        "train_seconds": data.transfer_seconds + run.train_seconds,
        "setup_seconds": run.setup_seconds,
        "transfer_seconds": data.transfer_seconds,
        "compile_seconds": run.compile_seconds,
        "images_per_second": run.images_per_second,
    }
    return dataclasses.replace(new, status="finished", epochs=run.epochs, result=result)
