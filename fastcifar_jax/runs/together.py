"""Many seeds of a recipe side by side, over devices and processes: trained, shown and put on record."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from jax.sharding import Mesh
from rich.console import Console

from fastcifar_jax.cli import console as report
from fastcifar_jax.parallel import hosts
from fastcifar_jax.parallel.mesh import Strategy
from fastcifar_jax.parallel.seeds import make_train_seeds
from fastcifar_jax.runs import records
from fastcifar_jax.runs import runner as runs
from fastcifar_jax.runs.records import Record, RecordError
from fastcifar_jax.runs.runner import RunSpec
from fastcifar_jax.train import CompiledRun, Diverged, Driver, steps_of_epochs
from fastcifar_jax.types import EpochInfo


class Refused(ValueError):
    """Nothing was trained: a recipe that does not fit the mesh, or processes that disagree about what is to be run."""


def run_together(
    job: RunSpec,
    seeds: Iterable[int],
    ended: list[Record],
    console: Console,
    out: Path,
    driver: Driver,
    arguments: tuple[str, ...],
    *,
    strategy: Strategy,
    mesh: Mesh,
    rerun: bool = False,
    compiled: dict[tuple, CompiledRun] | None = None,
) -> None:
    """Runs many seeds of one recipe side by side, with the arguments of `runs.make_runner` and `make_train_seeds`.

    With several processes all call this alike. Process 0 alone decides which seeds are on record, writes and prints.

    Args:
      job: what to run, in JAX.
      seeds: of the runs.
      ended: gets the record of each seed as it ends; on the other processes too, but without those on file.
      console: where to show it.
      out: folder of the records.
      driver: of JAX's training loop.
      arguments: of the command, for the record.
      strategy: what a device does with several seeds.
      mesh: from `make_mesh`.
      rerun: whether to run what is on record as well.
      compiled: programs that the recipes of a sweep share.

    Raises:
      RecordError: a record cannot be written.
      Refused: nothing was trained.
    """
    shape = "x".join(str(size) for size in mesh.shape.values())
    new = runs.new_record(job, arguments, shape)
    seeds, writes = list(seeds), hosts.writes_records()
    on_file = [None if rerun or not writes else runs.on_record(job, out, seed) for seed in seeds]
    for record in filter(None, on_file):
        runs.show_existing(job, record, new, console)
        ended.append(record)
    flags = hosts.from_process_0([int(record is None) for record in on_file])
    todo = [seed for seed, flag in zip(seeds, flags, strict=True) if flag]
    if not todo:
        return
    new = dataclasses.replace(new, started=runs.now())
    rows: dict[int, list[EpochInfo]] = {seed: [] for seed in todo}
    steps_per_epoch = job.data.info.train // job.recipe.batch_size

    def end(record):
        if writes:
            records.write(record, out, tta=job.recipe.published.tta)
        ended.append(record)
        del rows[record.seed]
        console.print(report.seed_line(job.arm, record), soft_wrap=True)

    def on_seed(seed, outcome):
        of_seed = dataclasses.replace(new, seed=seed)
        diverged = isinstance(outcome, Diverged)
        end(runs.diverged(of_seed, outcome) if diverged else runs.finished(of_seed, outcome, job.data))

    def on_epoch(seed, row):
        rows[seed].append(row)
        num_images = steps_of_epochs(job.recipe, steps_per_epoch)[row.epoch - 1] * job.recipe.batch_size
        rate = num_images / row.train_seconds
        console.print(f"{report.epoch_row(row, rate)}   seed {seed}", soft_wrap=True)

    console.print(f"{job.arm}, seeds {', '.join(map(str, todo))}: {strategy} on {shape} devices", soft_wrap=True)
    num_classes = len(job.data.info.classes)
    train = make_train_seeds(job.recipe, num_classes, strategy, mesh, driver, keep_states=False, compiled=compiled)
    try:
        train(todo, job.data.dataset, on_seed, on_epoch)
    except RecordError:
        raise
    except Exception as error:
        if isinstance(error, ValueError) and not any(rows.values()):
            raise Refused(f"{job.arm}: {error}") from error
        # Which seeds were under way is known only of those that have ended an epoch.
        for seed in [seed for seed in rows if rows[seed]] or list(rows)[:1]:
            try:
                end(runs.crashed(dataclasses.replace(new, seed=seed), error, rows[seed]))
            except RecordError as fault:
                error.add_note(str(fault))
        raise
