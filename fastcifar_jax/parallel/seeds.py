"""Many seeds over many devices: every row of a mesh trains its seeds one after another, in a thread of its own.

On one device a seed is the same program as without a mesh, so its numbers are bitwise those of any other device of the
kind. Where a row shares its batches, XLA partitions that program; sums are rounded in another order.
"""

import functools
import queue
import threading
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from fastcifar_jax.ops import backend
from fastcifar_jax.parallel.hosts import gather, require_agreement
from fastcifar_jax.parallel.mesh import place, row_of_devices
from fastcifar_jax.recipe import Recipe, resolve_dtype
from fastcifar_jax.train import Diverged, compile_run, run_result, train_epochs
from fastcifar_jax.types import Dataset, EpochInfo, RunResult

Outcome = RunResult | Diverged


def train_seeds(
    recipe: Recipe,
    num_classes: int,
    seeds: Sequence[int],
    dataset: Dataset,
    mesh: Mesh,
    *,
    tta_every_epoch: bool = False,
) -> Iterator[tuple[int, EpochInfo | Outcome]]:
    """The runs of many seeds; each row of devices compiles once.

    With several processes all call this with the same arguments, and all get every outcome; the epochs, and the states
    in the outcomes, of the seeds that they train themselves.

    Args:
      recipe: what to run.
      num_classes: size of the logits.
      seeds: seed i trains on row `i % rows`.
      dataset: arrays of this process.
      mesh: from `make_mesh`.
      tta_every_epoch: see `compile_run`.

    Yields:
      `(seed, row of its epoch table)` after each epoch, and last `(seed, outcome)`: a `RunResult`, or the `Diverged` of
      a seed whose loss was not finite, which ends no other seed.

    Raises:
      ValueError: a recipe that does not fit the data or the mesh, or processes that were given different things.
    """
    recipe = resolve_dtype(recipe)
    what = (recipe, list(seeds), mesh.devices.shape, tta_every_epoch, backend.conv_backend()[0])
    require_agreement(what, dataset)
    compile_for = functools.partial(compile_run, recipe, num_classes, tta_every_epoch=tta_every_epoch)
    me, rows = jax.process_index(), len(mesh.devices)
    local = {i: row for i, row in enumerate(mesh.devices) if me in {device.process_index for device in row}}
    shared = rows == 1  # by all processes, which then have the outcomes already
    # Processes exchange their outcomes after each round of one seed per row; one process has a single round.
    size = rows if jax.process_count() > 1 else max(len(seeds), 1)
    for start in range(0, len(seeds), size):
        round_seeds = seeds[start : start + size]
        work = [(row, round_seeds[i::rows]) for i, row in local.items()]
        outcomes: dict[int, Outcome] = {}
        for seed, news in _train_rows(recipe, num_classes, compile_for, work, dataset):
            if not isinstance(news, EpochInfo):
                outcomes[seed] = news
            yield seed, news
        if shared:
            continue
        for packed in gather([_packed(seed, outcome) for seed, outcome in outcomes.items()]):
            others = (_unpacked(recipe.name, *fields) for fields in packed)
            yield from ((seed, outcome) for seed, outcome in others if seed not in outcomes)


def _train_rows(recipe, num_classes, compile_for, work, dataset):
    """Trains each row's seeds in a thread; yields in the caller's thread, where an error is raised too."""
    news: queue.SimpleQueue = queue.SimpleQueue()
    stop = threading.Event()

    def train_row(devices, seeds):
        with row_of_devices(devices) as placement:
            data = place(dataset, placement)
            compiled = compile_for(data)
            for i, seed in enumerate(seeds):
                key = _key(seed, placement)
                try:
                    for snapshot in train_epochs(recipe, num_classes, key, data, compiled=compiled):
                        news.put((seed, snapshot.epochs[-1]))
                        if stop.is_set():
                            return
                except Diverged as error:
                    news.put((seed, error))
                else:
                    seconds = 0.0 if i else compiled.seconds
                    news.put((seed, run_result(recipe, len(dataset.train_labels), snapshot, seconds)))

    def guarded(devices, seeds):
        try:
            train_row(devices, seeds)
        except BaseException as error:
            news.put((None, error))
        finally:
            news.put((None, None))

    threads = [threading.Thread(target=guarded, args=args, daemon=True) for args in work]
    try:
        for thread in threads:
            thread.start()
        running = len(threads)
        while running:
            seed, item = news.get()
            if seed is not None:
                yield seed, item
            elif item is None:
                running -= 1
            else:
                raise item
    finally:
        stop.set()  # the other rows end with their current epoch
        for thread in threads:
            thread.join()


def _key(seed, placement):
    if isinstance(placement, jax.Device):
        return jax.random.key(seed)
    return jax.jit(jax.random.key, out_shardings=placement)(np.uint32(seed))  # on the devices of all processes


def _packed(seed: int, outcome: Outcome) -> list:
    """An outcome as JSON can hold it, without the state."""
    return [seed, outcome.epochs, None if isinstance(outcome, Diverged) else outcome[2:]]


def _unpacked(name: str, seed: int, epochs: list, rest: list | None) -> tuple[int, Outcome]:
    rows = tuple(EpochInfo(*row) for row in epochs)
    return seed, Diverged(name, rows) if rest is None else RunResult(None, rows, *rest)
