"""Runs of recipes by either framework: trained, shown and put on record, a seed at a time."""

import dataclasses
import datetime
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import jax
import numpy as np
from rich.console import Console

from fastcifar_jax import conv, records, report
from fastcifar_jax.data import DataInfo, load
from fastcifar_jax.recipe import Recipe, flatten
from fastcifar_jax.records import Record, RecordError
from fastcifar_jax.train import Diverged, Driver, make_train
from fastcifar_jax.types import Dataset, RunResult

Train = Callable[..., RunResult]  # (seed, on_epoch, on_step, on_compiled)


class LoadedData(NamedTuple):
    """A data set on the device."""

    dataset: Dataset
    info: DataInfo
    transfer_seconds: float


class Job(NamedTuple):
    """One recipe with its data, and the framework that trains it."""

    recipe: Recipe
    path: Path  # of the experiment's file
    as_published: bool  # the declared recipe on the data that the published figures are of
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


def on_record(job: Job, out: Path, seed: int) -> Record | None:
    """The record of a run that need not be repeated: the same seed diverges again, but may not crash again."""
    path = records.path_of(out, job.framework, job.recipe.name, job.recipe.hash, job.data.info.hash, seed)
    record = records.read(path) if path.exists() else None
    return record if record and record.status != "crashed" else None


def make_runner(
    job: Job,
    ended: list[Record],
    console: Console,
    out: Path,
    driver: Driver,
    arguments: tuple[str, ...],
    *,
    again: bool = False,
) -> Callable[[int], Record]:
    """The runs of one recipe, which compile once.

    Args:
      job: what to run.
      ended: gets the record of each seed as it ends, so that an interruption or a crash loses none.
      console: where to show it.
      out: folder of the records.
      driver: of JAX's training loop.
      arguments: of the command, for the record.
      again: whether to run what is on record as well.

    Returns:
      `run(seed)`: the record of that seed, which is on file when it returns. It raises RecordError for a record that
      cannot be written, and whatever a crashed run raised after its record is written. A diverged run is no exception.
    """
    recipe, info = job.recipe, job.data.info
    train = _trainer(job, driver)
    new = Record(
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
        conv="torch" if job.twin else conv.way()[0],
        driver="python" if job.twin else driver,
        command=arguments,
        started="",
        epochs=(),
        result=None,
    )
    each_step = conv.waits_are_cheap()
    compiles = True

    def run(seed: int) -> Record:
        nonlocal compiles
        known = None if again else on_record(job, out, seed)
        if known is not None:
            other = "".join(f", by another {name}" for name in _made_otherwise(known, new))
            console.print(f"{report.seed_line(known)} (on record{other}; --again repeats it)", soft_wrap=True)
            ended.append(known)
            return known
        label = f"{report.arm_name(new)}, seed {seed}"
        with report.watch(console, label, recipe, info.train, compiles=compiles, each_step=each_step) as callbacks:
            record, failure = _train_seed(dataclasses.replace(new, seed=seed), train, job.data, *callbacks)
        compiles = False
        try:
            records.write(record, out, tta=recipe.published.tta)
        except RecordError as error:
            if failure is None:
                raise
            failure.add_note(str(error))
        ended.append(record)
        console.print(report.seed_line(record), soft_wrap=True)
        if failure is not None:
            raise failure
        return record

    return run


def run_in_turn(runners: dict[str, Callable[[int], Record]], seeds: Iterable[int]) -> dict[str, list[Record]]:
    """The records of several recipes, seed by seed and with the order turned each time: A B, B A, A B, ...

    A machine that slows down, or a driver that is updated overnight, then meets all of them alike.
    """
    ended = {name: [] for name in runners}
    for i, seed in enumerate(seeds):
        for name in list(runners)[:: 1 if i % 2 == 0 else -1]:
            ended[name].append(runners[name](seed))
    return ended


def _trainer(job: Job, driver: Driver) -> Train:
    num_classes = len(job.data.info.classes)
    if job.twin is None:
        train = make_train(job.recipe, num_classes, driver)
        return lambda seed, *callbacks: train(jax.random.key(seed), job.data.dataset, *callbacks)
    train = job.twin.make_train(job.recipe, num_classes)
    arrays = Dataset(*(np.asarray(array) for array in job.data.dataset))
    return lambda seed, *callbacks: train(seed, arrays, *callbacks)


def _made_otherwise(known: Record, new: Record) -> list[str]:
    """What differs in the making of two records of one run."""
    fields = {"source code": "source_hash", "device": "device", "driver": "driver"}
    return [text for text, name in fields.items() if getattr(known, name) != getattr(new, name)]


def _train_seed(
    new: Record,
    train: Train,
    data: LoadedData,
    on_epoch: report.OnEpoch,
    on_step: report.OnStep | None,
    on_compiled: report.OnCompiled,
) -> tuple[Record, Exception | None]:
    """The record of one run, and the exception of a run that crashed."""
    rows = []

    def on_epoch_kept(row):
        rows.append(row)
        on_epoch(row)

    new = dataclasses.replace(new, started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))
    try:
        run = train(new.seed, on_epoch_kept, on_step, on_compiled)
    except Diverged as error:
        return dataclasses.replace(new, status="diverged", error=str(error), epochs=error.epochs), None
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        return dataclasses.replace(new, status="crashed", error=message, epochs=tuple(rows)), error
    result = {
        "test_accuracy": run.epochs[-1].test_accuracy,
        "tta_accuracy": run.epochs[-1].tta_accuracy,
        "train_seconds": data.transfer_seconds + run.train_seconds,
        "setup_seconds": run.setup_seconds,
        "transfer_seconds": data.transfer_seconds,
        "compile_seconds": run.compile_seconds,
        "images_per_second": run.images_per_second,
    }
    return dataclasses.replace(new, status="finished", epochs=run.epochs, result=result), None
