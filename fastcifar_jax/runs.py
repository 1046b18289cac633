"""The seeds of a recipe, one after another: trained, shown and put on record."""

import dataclasses
import datetime
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
from rich.console import Console

from fastcifar_jax import conv, records, report
from fastcifar_jax.data import DataInfo, load
from fastcifar_jax.recipe import Recipe, flatten
from fastcifar_jax.records import Record, RecordError
from fastcifar_jax.train import Diverged, Driver, make_train
from fastcifar_jax.types import Dataset, RunResult


class LoadedData(NamedTuple):
    """A data set on the device."""

    dataset: Dataset
    info: DataInfo
    transfer_seconds: float


class Job(NamedTuple):
    """One recipe of a `run` command with its data."""

    recipe: Recipe
    path: Path  # of the experiment's file
    as_published: bool  # the declared recipe on the data that the published figures are of
    data: LoadedData
    seeds: dict[int, Record | None]  # what is on record already, unless it is to be run again


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


def on_record(out: Path, recipe: Recipe, data: LoadedData, seed: int) -> Record | None:
    """The record of a run that need not be repeated: the same seed diverges again, but may not crash again."""
    path = records.path_of(out, recipe.name, recipe.hash, data.info.hash, seed)
    record = records.read(path) if path.exists() else None
    return record if record and record.status != "crashed" else None


def run_job(
    job: Job, ended: list[Record], console: Console, out: Path, driver: Driver, arguments: tuple[str, ...]
) -> None:
    """Runs the seeds of one recipe that are not on record.

    Args:
      job: what to run.
      ended: gets the record of each seed as it ends, so that an interruption loses none.
      console: where to show it.
      out: folder of the records.
      driver: of the training loop.
      arguments: of the command, for the record.

    Raises:
      RecordError: a record cannot be written.
      Exception: whatever a crashed run raised, after its record is written. A diverged run is no exception.
    """
    recipe, info = job.recipe, job.data.info
    source_hash = records.source_hash(job.path)
    train = make_train(recipe, len(info.classes), driver)
    new = Record(
        experiment=recipe.name,
        framework="jax",
        recipe=flatten(recipe),
        recipe_repr=repr(recipe),
        recipe_hash=recipe.hash,
        seed=0,
        status="crashed",
        error=None,
        data={"source": info.source, "hash": info.hash, "train": info.train, "test": info.test},
        device=records.device(),
        versions=records.versions(),
        source_hash=source_hash,
        conv=conv.way()[0],
        driver=driver,
        command=arguments,
        started="",
        epochs=(),
        result=None,
    )
    compiles = True
    each_step = conv.waits_are_cheap()
    for seed, record in job.seeds.items():
        if record is not None:
            ended.append(record)
            other = "".join(
                f", by another {what}"
                for what, then, now in (
                    ("source code", record.source_hash, source_hash),
                    ("device", record.device, new.device),
                    ("driver", record.driver, driver),
                )
                if then != now
            )
            console.print(f"{report.seed_line(record)} (on record{other}; --again repeats it)", soft_wrap=True)
            continue
        label = f"{recipe.name}, seed {seed}"
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

    finished = [record for record in ended[-len(job.seeds) :] if record.status == "finished"]
    if len(finished) > 1:
        console.print(report.seeds_line(finished), soft_wrap=True)
    if job.as_published and recipe.published.accuracy is not None:
        console.print(report.published_line(recipe), soft_wrap=True)


def _train_seed(
    new: Record,
    train: Callable[..., RunResult],
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
        run = train(jax.random.key(new.seed), data.dataset, on_epoch_kept, on_step, on_compiled)
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
