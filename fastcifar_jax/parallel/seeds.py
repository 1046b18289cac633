"""Many seeds: one after another, side by side on one device, or over a mesh of devices and hosts.

A seed is the same run under every strategy and on every mesh: the same key, the same functions of `train.py`.

* One after another ("loop"), a seed is the program of `make_train`; over the `seed` axis of a mesh every device runs
  that same program, in a thread of its own, so the numbers are bitwise those of one device.
* All else is one program for all seeds and devices, by way of `jax.shard_map`. XLA simplifies such a program in
  another order, so rounding differs, and nothing else.
* Over the `batch` axis each device trains on a share of every batch, and sums of the loss and the gradients are taken
  over all of them in every step. A ghost group stays whole on one device where the number of groups is a multiple of
  the devices; otherwise its statistics are averaged over all devices in every norm (synchronised batch norm).
"""

import functools
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import get_args

import jax
import numpy as np
from jax.sharding import Mesh

from fastcifar_jax.ops import backend
from fastcifar_jax.ops.backend import Driver, default_driver
from fastcifar_jax.parallel.hosts import gather, place, require_agreement, to_host
from fastcifar_jax.parallel.mesh import Strategy, compile_for_mesh, make_mesh, raw_keys, spread_over
from fastcifar_jax.recipe import Recipe, resolve_dtype
from fastcifar_jax.schedules import count_steps
from fastcifar_jax.train import CompiledRun, Diverged, make_train, steps_of_epochs
from fastcifar_jax.tunable import program_key, tunable
from fastcifar_jax.types import Dataset, EpochInfo, RunResult

Outcome = RunResult | Diverged


def make_train_seeds(
    recipe: Recipe,
    num_classes: int,
    strategy: Strategy = "loop",
    mesh: Mesh | None = None,
    driver: Driver | None = None,
    at_once: int | None = None,
    keep_states: bool = True,
    compiled: dict[tuple, CompiledRun] | None = None,
) -> Callable[..., list[Outcome]]:
    """The runs of many seeds as a function of the seeds and a data set; compiled once for all of them.

    Args:
      recipe: what to run.
      num_classes: size of the logits.
      strategy: what a device does with several seeds. "loop" runs one after another; "map" and "vmap" carry them
        through each epoch together, one by one in a loop or as one batch of networks. See `benchmarks/seeds.py` for
        what they cost.
      mesh: from `make_mesh`; None for the default device. Each row of devices along `batch` runs other seeds.
      driver: "python" calls a compiled step, "scan" a compiled epoch; None picks by platform.
      at_once: seeds that a device carries together under "map" and "vmap"; None for all.
      keep_states: False leaves None in `RunResult.state`, for more seeds than states find room.
      compiled: programs to use and to add to, shared by the recipes of a sweep; None keeps them for this one alone.

    Returns:
      `train_seeds(seeds, dataset, on_seed=None, on_epoch=None, on_compiled=None) -> outcomes`, in the order of the
      seeds: a `RunResult`, or the `Diverged` of a seed whose loss was not finite, which takes no other seed down.
      `on_seed(seed, outcome)` is called as soon as an outcome is known, `on_epoch(seed, info)` with each finished
      `EpochInfo`, `on_compiled(seconds)` before the first step of each group of seeds that starts together.

      The seconds of seeds that a device carries together are the elapsed ones over their number: what a seed costs,
      not how long it took. `RunResult.state` is on the device of a seed's own program, and NumPy arrays after a common
      one. With several processes all call this alike and all get all outcomes, but the state of a seed's own program
      stays where it was trained and is None elsewhere.

    Raises:
      ValueError: an unknown strategy; by `train_seeds`: a recipe that does not fit the data or the mesh, or processes
        that disagree about what is to be run.
    """
    if strategy not in get_args(Strategy):
        raise ValueError(f"strategy is {strategy!r}; choose one of {', '.join(get_args(Strategy))}")
    if at_once is not None and at_once < 1:
        raise ValueError(f"at_once is {at_once}; give a number of seeds >= 1, or None for all")
    driver = driver or default_driver()
    if mesh is None and strategy == "loop":
        return _make_loop(recipe, num_classes, driver, keep_states, compiled)
    mesh = make_mesh(1, 1) if mesh is None else mesh
    if strategy == "loop" and mesh.shape["batch"] == 1:
        return _make_loops(recipe, num_classes, mesh, driver, keep_states)
    compiled = {} if compiled is None else compiled

    def train_seeds(
        seeds: Sequence[int],
        dataset: Dataset,
        on_seed: Callable[[int, Outcome], None] | None = None,
        on_epoch: Callable[[int, EpochInfo], None] | None = None,
        on_compiled: Callable[[float], None] | None = None,
    ) -> list[Outcome]:
        seeds = list(seeds)
        require_agreement((resolve_dtype(recipe), seeds, strategy, driver, at_once, backend.conv_backend()[0]), dataset)
        rows = mesh.shape["seed"]
        each = 1 if strategy == "loop" else max(1, min(at_once or len(seeds), -(-len(seeds) // rows)))
        dataset = place(dataset, spread_over(mesh))
        outcomes = []
        for start in range(0, len(seeds), rows * each):
            group = seeds[start : start + rows * each]
            shapes = tuple((a.shape, str(a.dtype)) for a in dataset)
            program = (program_key(recipe), num_classes, driver, strategy, mesh, each, shapes)
            compile_seconds = 0.0
            if program not in compiled:
                began = time.perf_counter()
                compiled[program] = compile_for_mesh(recipe, num_classes, dataset, driver, strategy, mesh, each)
                compile_seconds = time.perf_counter() - began
            if on_compiled is not None:
                on_compiled(compile_seconds)
            # Devices without a seed of their own repeat the last one; nobody looks at what they do.
            padded = group + group[-1:] * (rows * each - len(group))
            keys = raw_keys(padded, mesh)
            outcomes += _train_group(
                recipe, compiled[program], group, keys, dataset, each, compile_seconds, keep_states, on_seed, on_epoch
            )
        return outcomes

    return train_seeds


def _lean(outcome: Outcome, keep_states: bool) -> Outcome:
    return outcome if keep_states or isinstance(outcome, Diverged) else outcome._replace(state=None)


def _make_loop(recipe, num_classes, driver, keep_states, compiled):
    train = make_train(recipe, num_classes, driver, compiled)

    def train_seeds(seeds, dataset, on_seed=None, on_epoch=None, on_compiled=None):
        seeds = list(seeds)
        outcomes = []
        for seed in seeds:
            seen = None if on_epoch is None else functools.partial(on_epoch, seed)
            try:
                run = train(jax.random.key(seed), dataset, on_epoch=seen, on_compiled=on_compiled)
                outcome = _lean(run, keep_states)
            except Diverged as error:
                outcome = error
            outcomes.append(outcome)
            if on_seed is not None:
                on_seed(seed, outcome)
        return outcomes

    return train_seeds


def _make_loops(recipe, num_classes, mesh, driver, keep_states):
    """`make_train` on every device of a mesh; a device takes the next seed when it has ended one."""
    devices, me = list(mesh.devices.flat), jax.process_index()
    trains = {device: make_train(recipe, num_classes, driver) for device in devices if device.process_index == me}

    def train_seeds(seeds, dataset, on_seed=None, on_epoch=None, on_compiled=None):
        seeds = list(seeds)
        require_agreement((resolve_dtype(recipe), seeds, "loop", driver, backend.conv_backend()[0]), dataset)
        copies = {device: jax.device_put(dataset, device) for device in trains}
        outcomes: dict[int, Outcome] = {}  # position -> outcome

        def end(i, outcome):
            outcomes[i] = _lean(outcome, keep_states)
            if on_seed is not None:
                on_seed(seeds[i], outcomes[i])

        # Several processes tell each other their outcomes whenever each device has had a seed.
        group = len(devices) if jax.process_count() > 1 else len(seeds)
        for start in range(0, len(seeds), max(group, 1)):
            positions = range(start, min(start + group, len(seeds)))
            mine = [i for i in positions if devices[i % len(devices)].process_index == me]
            _run_on_devices(trains, copies, seeds, mine, end, on_epoch, on_compiled)
            for packed in gather([_packed(i, outcomes[i]) for i in mine]):
                for i, outcome in (_unpacked(recipe.name, *fields) for fields in packed):
                    if i not in outcomes:
                        end(i, outcome)
        return [outcomes[i] for i in range(len(seeds))]

    return train_seeds


def _run_on_devices(trains, copies, seeds, positions, end, on_epoch, on_compiled):
    """Trains the seeds at `positions`; the callbacks are called in the caller's thread, as is what a run raises."""
    todo, events, stop = queue.SimpleQueue(), queue.SimpleQueue(), threading.Event()
    for i in positions:
        todo.put(i)

    def tell(callback, *values):
        if callback is not None:
            events.put(functools.partial(callback, *values))
        if stop.is_set():
            raise InterruptedError

    def fail(error):
        raise error

    def train_one(device, i):
        seen = functools.partial(tell, on_epoch, seeds[i])
        compiled = functools.partial(tell, on_compiled)
        try:
            return trains[device](jax.random.key(seeds[i]), copies[device], seen, on_compiled=compiled)
        except Diverged as error:
            return error

    def work(device):
        try:
            with jax.default_device(device):
                while True:
                    i = todo.get_nowait()
                    tell(end, i, train_one(device, i))
        except queue.Empty:
            pass
        except Exception as error:
            events.put(functools.partial(fail, error))

    threads = [threading.Thread(target=work, args=(device,), daemon=True) for device in trains]
    try:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads) or not events.empty():
            try:
                event = events.get(timeout=0.1)
            except queue.Empty:
                continue
            event()
    finally:
        stop.set()  # an interrupted or failed run ends the others at the end of their epochs
        for thread in threads:
            thread.join()


def _packed(i: int, outcome: Outcome) -> list:
    """What other processes are told of an outcome, as JSON has it."""
    if isinstance(outcome, Diverged):
        return [i, outcome.epochs, None]
    return [i, outcome.epochs, outcome[2:]]


def _unpacked(name: str, i: int, epochs: list, rest: list | None) -> tuple[int, Outcome]:
    rows = tuple(EpochInfo(*row) for row in epochs)
    return i, Diverged(name, rows) if rest is None else RunResult(None, rows, *rest)


def _train_group(recipe, programs, seeds, keys, dataset, each, compile_seconds, keep_states, on_seed, on_epoch):
    """Trains seeds that start and end together.

    Args:
      recipe: what to run.
      programs: of `compile_for_mesh`.
      seeds: whose outcomes are wanted; the first of the states' leading axis.
      keys: raw, one for each state.
      dataset: on every device of the mesh.
      each: seeds that a device carries.
      compile_seconds: spent before; the first seed's result names them.
      keep_states: as in `make_train_seeds`.
      on_seed: as in `make_train_seeds`.
      on_epoch: as in `make_train_seeds`.

    Returns:
      The outcomes, in the order of `seeds`.
    """
    start = time.perf_counter()
    values = tunable(recipe)
    state = jax.block_until_ready(programs.init(values, keys, dataset))
    setup_seconds = (time.perf_counter() - start) / each
    rows: list[list[EpochInfo]] = [[] for _ in seeds]
    outcomes: list[Outcome | None] = [None] * len(seeds)

    def end(i, outcome):
        outcomes[i] = outcome
        if on_seed is not None:
            on_seed(seeds[i], outcome)

    for epoch, num_steps in enumerate(steps_of_epochs(recipe, programs.steps_per_epoch), start=1):
        start = time.perf_counter()
        plan = programs.plan(keys, np.int32(epoch), dataset)
        state, totals = jax.block_until_ready(
            programs.train_epoch(values, state, dataset, plan, epoch, num_steps, None)
        )
        seconds = (time.perf_counter() - start) / each
        state = programs.finalize_batch_stats(state, epoch)
        totals, test = to_host((totals, programs.evaluate(values, state, dataset)))
        for i, seed in enumerate(seeds):
            if outcomes[i] is not None:
                continue
            loss, accuracy = (x[i].item() / (num_steps * recipe.batch_size) for x in totals)
            row = EpochInfo(epoch, seconds, loss, accuracy, *(x[i].item() / len(dataset.test_labels) for x in test))
            rows[i].append(row)
            if not (math.isfinite(loss) and math.isfinite(row.test_loss)):
                end(i, Diverged(recipe.name, tuple(rows[i])))
            elif on_epoch is not None:
                on_epoch(seed, row)
        if None not in outcomes:  # all diverged
            return outcomes

    num_images = count_steps(recipe.num_epochs, programs.steps_per_epoch) * recipe.batch_size
    states = to_host(state) if keep_states else None
    for i in range(len(seeds)):
        if outcomes[i] is None:
            rate = num_images / sum(row.train_seconds for row in rows[i])
            one = jax.tree.map(lambda x, i=i: x[i], states)
            end(i, RunResult(one, tuple(rows[i]), setup_seconds, compile_seconds if i == 0 else 0.0, rate))
    return outcomes
