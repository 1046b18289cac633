"""Runs that are put on record: iterators of what happens, for the caller to show."""

import contextlib
import dataclasses
import datetime
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np

from fastcifar_jax.data import load
from fastcifar_jax.data.load import DataInfo
from fastcifar_jax.functions import eval_variables, make_functions, shapes_of
from fastcifar_jax.hparams import program_key
from fastcifar_jax.recipe import Recipe, to_dict
from fastcifar_jax.runs import checkpoint, provenance, records
from fastcifar_jax.runs import saved_model as saved
from fastcifar_jax.runs.checkpoint import CheckpointError
from fastcifar_jax.runs.records import Record, RecordError
from fastcifar_jax.train import CompiledRun, Diverged, OnSteps, compile_run, run_result, train_epochs
from fastcifar_jax.types import Dataset, EpochInfo, RunResult, Snapshot

Programs = dict[tuple, CompiledRun]  # compiled ones, shared by the recipes of a command


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


class RunSettings(NamedTuple):
    """How runs are made and kept."""

    out: Path  # folder of all records
    command: tuple[str, ...]  # arguments of the command line, for the records
    rerun: bool = False  # also what is on record
    checkpoint: bool = False  # save the state after every epoch, and continue from what a killed run saved
    save: bool = False  # keep the trained model beside the record
    tta_every_epoch: bool = False  # evaluate with test-time augmentation after every epoch, not only after the last


class Existing(NamedTuple):
    """A record that makes a run unnecessary."""

    record: Record
    differs: tuple[str, ...]  # names in its provenance that a run would have differently now


class Event(NamedTuple):
    """What happened in a run: a message, a finished epoch, or the record, which is the last event of a run."""

    spec: RunSpec
    seed: int
    news: str | EpochInfo | Existing | Record


def record_of(event: Event) -> Record | None:
    """The record that an event brings, new or existing."""
    news = event.news.record if isinstance(event.news, Existing) else event.news
    return news if isinstance(news, Record) else None


def load_data(source: str, limit_train: int | None) -> LoadedData:
    """Loads a data set and puts it on the device.

    Raises:
      DataError: it cannot be read.
    """
    jax.devices()  # before tensorflow-datasets may import TensorFlow, which would take the memory of a GPU
    dataset, info = load.load_data(source, limit_train=limit_train)
    began = time.perf_counter()
    dataset = jax.block_until_ready(jax.device_put(dataset))
    return LoadedData(dataset, info, time.perf_counter() - began)


def make_folders(specs: Iterable[RunSpec], settings: RunSettings) -> None:
    """Makes the folders of the records.

    Raises:
      RecordError: one cannot be made or written to.
    """
    for spec in specs:
        records.make_folder(path_of(spec, settings, 0).parent)


def path_of(spec: RunSpec, settings: RunSettings, seed: int) -> Path:
    """Path of the record of a run."""
    return records.path_of(settings.out, spec.framework, spec.recipe.name, spec.recipe.hash, spec.data.info.hash, seed)


def existing_record(spec: RunSpec, settings: RunSettings, seed: int) -> Record | None:
    """The record that makes a run unnecessary: a diverged seed diverges again, a crashed one may not crash again.

    With `settings.save` a finished run counts only if its model was saved too.

    Raises:
      RecordError: the record is damaged.
    """
    path = path_of(spec, settings, seed)
    if settings.rerun or not path.exists():
        return None
    record = records.read(path)
    if settings.save and record.status == "finished" and not path.with_suffix(saved.SUFFIX).exists():
        return None
    return None if record.status == "crashed" else record


def run_all(
    specs: Sequence[RunSpec],
    seeds: Iterable[int],
    settings: RunSettings,
    programs: Programs,
    on_steps: OnSteps | None = None,
) -> Iterator[Event]:
    """Several recipes, seed by seed, in an order that turns each time: A B, B A, A B, ...

    A machine that slows down, or a driver that is updated overnight, then affects all of them alike.

    Args:
      specs: what to run.
      seeds: of the runs of each.
      settings: how.
      programs: compiled ones; gets new ones.
      on_steps: see `train_epochs`.

    Raises:
      RecordError: a record cannot be written.
      Exception: whatever a run raised that crashed, after its record is written. A diverged run raises nothing.
    """
    for i, seed in enumerate(seeds):
        for spec in specs[:: 1 if i % 2 == 0 else -1]:
            for news in _run_seed(spec, seed, settings, programs, on_steps):
                yield Event(spec, seed, news)


def _run_seed(spec, seed, settings, programs, on_steps):
    new = new_record(spec, seed, settings.command)
    if existing := existing_record(spec, settings, seed):
        yield Existing(existing, tuple(existing.provenance.diff(new.provenance)))
        return
    state_file = path_of(spec, settings, seed).with_suffix(checkpoint.SUFFIX)
    rows: tuple[EpochInfo, ...] = ()
    failure = None
    try:
        compile_seconds = yield from _compile(spec, settings, programs)
        resume = None
        if settings.checkpoint and os.path.lexists(state_file):
            resume, message = _resume(spec, state_file, new)
            yield message
        yield "training"
        snapshot, rows = resume, resume.epochs if resume else ()  # a checkpoint of the last epoch leaves none to train
        yield from rows
        for snapshot in _snapshots(spec, seed, settings, programs, resume, on_steps):
            rows = snapshot.epochs
            if settings.checkpoint:
                yield from _save_checkpoint(state_file, snapshot, new)
            yield rows[-1]
        if settings.save:
            _save_model(spec, settings, seed, snapshot)
        result = run_result(spec.recipe, spec.data.info.train, snapshot, compile_seconds)
        record = finished(new, result, spec.data.transfer_seconds)
    except Exception as error:
        record, failure = failed(new, error, rows), None if isinstance(error, Diverged) else error
    try:
        records.write(record, settings.out, tta=spec.recipe.published.tta)
    except RecordError as error:
        if failure is None:
            raise
        failure.add_note(str(error))
    if record.status != "crashed":
        with contextlib.suppress(OSError):
            state_file.unlink()
    yield record
    if failure is not None:
        raise failure


def _compile(spec, settings, programs):
    """Makes the programs of a run unless they exist; returns the seconds that it took."""
    if (key := _program(spec, settings)) in programs:
        return 0.0
    yield "compiling"
    num_classes = len(spec.data.info.classes)
    if spec.twin:
        programs[key] = None  # PyTorch keeps its programs itself
        return spec.twin.warm_up(spec.recipe, num_classes, _host_arrays(spec))
    programs[key] = compile_run(spec.recipe, num_classes, spec.data.dataset, tta_every_epoch=settings.tta_every_epoch)
    return programs[key].seconds


def _program(spec, settings):
    shapes = tuple((array.shape, str(array.dtype)) for array in spec.data.dataset)
    key = spec.framework, program_key(spec.recipe), len(spec.data.info.classes)
    return *key, shapes, settings.tta_every_epoch


def _snapshots(spec, seed, settings, programs, resume, on_steps) -> Iterator[Snapshot]:
    num_classes = len(spec.data.info.classes)
    if spec.twin:
        options = {"tta_every_epoch": settings.tta_every_epoch, "on_steps": on_steps}
        return spec.twin.train_epochs(spec.recipe, num_classes, seed, _host_arrays(spec), **options)
    key, compiled = jax.random.key(seed), programs[_program(spec, settings)]
    options = {"compiled": compiled, "resume": resume, "on_steps": on_steps}
    return train_epochs(spec.recipe, num_classes, key, spec.data.dataset, **options)


def _host_arrays(spec):
    return Dataset._make(np.asarray(array) for array in spec.data.dataset)


def _resume(spec, state_file, new):
    """The snapshot in a checkpoint, or None, and a message about it: a fault costs no run."""
    functions = make_functions(spec.recipe, len(spec.data.info.classes), spec.data.info.train)
    try:
        resume = checkpoint.load_checkpoint(state_file, new, shapes_of(functions, spec.recipe, spec.data.dataset).state)
    except CheckpointError as error:
        return None, f"warning: {error}; starting from the beginning"
    return resume, f"continuing after epoch {len(resume.epochs)}, from {state_file}"


def _save_checkpoint(state_file, snapshot, new):
    try:
        checkpoint.save_checkpoint(state_file, snapshot, new)
    except CheckpointError as error:
        yield f"warning: no checkpoint of epoch {len(snapshot.epochs)}: {error}; training continues"


def _save_model(spec, settings, seed, snapshot):
    last, variables = snapshot.epochs[-1], eval_variables(snapshot.state)
    accuracies = last.test_accuracy, last.tta_accuracy
    model = saved.of_run(spec.recipe, spec.data.info, spec.data.dataset, seed, variables, accuracies)
    saved.save_model(model, path_of(spec, settings, seed).with_suffix(saved.SUFFIX))


def new_record(spec: RunSpec, seed: int, command: tuple[str, ...], mesh: str = "1x1") -> Record:
    """Everything that is known of a run before it starts; it counts as crashed until it ends."""
    recipe, info, twin = spec.recipe, spec.data.info, spec.twin
    torch = {"conv_backend": "torch", "more_versions": twin.versions()} if twin else {}
    return Record(
        experiment=recipe.name,
        framework=spec.framework,
        recipe=to_dict(recipe, repr),
        recipe_repr=repr(recipe),
        recipe_hash=recipe.hash,
        seed=seed,
        status="crashed",
        error=None,
        provenance=provenance.collect(info, spec.path, recipe.compute_dtype, mesh=mesh, **torch),
        command=command,
        started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        epochs=(),
        result=None,
    )


def failed(new: Record, error: Exception, rows: Sequence[EpochInfo]) -> Record:
    """The record of a run that diverged, or that another exception ended after `rows`."""
    if isinstance(error, Diverged):
        return dataclasses.replace(new, status="diverged", error=str(error), epochs=error.epochs)
    return dataclasses.replace(new, error=f"{type(error).__name__}: {error}", epochs=tuple(rows))


def finished(new: Record, run: RunResult, transfer_seconds: float) -> Record:
    """The record of a run that came to its end."""
    result: dict[str, Any] = {
        "test_accuracy": run.epochs[-1].test_accuracy,
        "tta_accuracy": run.epochs[-1].tta_accuracy,
        "train_seconds": transfer_seconds + run.train_seconds,
        "setup_seconds": run.setup_seconds,
        "transfer_seconds": transfer_seconds,
        "compile_seconds": run.compile_seconds,
        "images_per_second": run.images_per_second,
    }
    return dataclasses.replace(new, status="finished", epochs=run.epochs, result=result)
