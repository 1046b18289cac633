"""A run of a recipe, compiled ahead of its first step, as an iterator over its epochs."""

import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import PRNGKeyArray

from fastcifar_jax.augment import EpochPlan
from fastcifar_jax.functions import make_functions, shapes_of, steps_of_epochs, zero_totals
from fastcifar_jax.hparams import HParams, hparams
from fastcifar_jax.ops import backend
from fastcifar_jax.optim import skipped_gradients
from fastcifar_jax.recipe import Recipe
from fastcifar_jax.schedules import count_steps
from fastcifar_jax.types import Dataset, EpochInfo, Evaluation, RunResult, Snapshot, StepInfo, TrainState

BLOCK_SECONDS = 1.0  # of steps between two reports of progress on a CPU

OnSteps = Callable[[int, int], None]  # (epoch, steps of it that are done)


class Diverged(ArithmeticError):
    """A loss that is not finite.

    Attributes:
      epochs: the rows of the epoch table up to and including the one that failed.
    """

    def __init__(self, name: str, epochs: tuple[EpochInfo, ...]):
        last = epochs[-1]
        super().__init__(
            f"{name} diverged in epoch {last.epoch}: training loss {last.train_loss}, test loss {last.test_loss}; "
            "lower optim.peak_lr"
        )
        self.epochs = epochs


class CompiledRun(NamedTuple):
    """The functions of a recipe, and of all with the same `program_key`, compiled for the shapes of one data set."""

    init: Callable[[PRNGKeyArray, Dataset], TrainState]
    plan: Callable[[PRNGKeyArray, np.int32, Dataset], EpochPlan]
    # (epoch, hparams, dataset, plan, (state, totals), start, num_steps)
    train_steps: Callable[..., tuple[TrainState, StepInfo]]
    finalize_batch_stats: Callable[[TrainState, int], TrainState]
    evaluate: Callable[[int, HParams, TrainState, Dataset], Evaluation]  # after an epoch
    loop: backend.StepLoop  # what one call of train_steps runs
    steps_per_epoch: int
    seconds: float  # spent on compiling and, on accelerators, warming up


def compile_run(recipe: Recipe, num_classes: int, dataset: Dataset, *, tta_every_epoch: bool = False) -> CompiledRun:
    """Compiles everything that a run needs, ahead of its first step.

    Within `jax.set_mesh(mesh)` of a mesh with the axis "batch", every batch is shared by its devices.

    Args:
      recipe: what to run.
      num_classes: size of the logits.
      dataset: arrays or `jax.ShapeDtypeStruct`s.
      tta_every_epoch: whether to evaluate with test-time augmentation after every epoch, not only after the last.

    Raises:
      ValueError: a recipe that does not fit the data.
    """
    began = time.perf_counter()
    num_train = len(dataset.train_labels)
    functions = make_functions(recipe, num_classes, num_train)
    key, number, state, totals, plan = shapes_of(functions, recipe, dataset)
    values, options = hparams(recipe), backend.compiler_options()
    # On a mesh every device has a copy of everything but the batch, see `over_devices`.
    copies = {} if jax.sharding.get_abstract_mesh().empty else {"in_shardings": P(), "out_shardings": P()}
    jit = functools.partial(jax.jit, **copies)
    steps_per_epoch = num_train // recipe.batch_size
    loop = backend.step_loop()

    @functools.cache
    def steps_program(skip_gradients, num_steps):
        # Epochs that train fewer parameters have a program of their own, which computes less.
        train_steps = make_functions(recipe, num_classes, num_train, skip_gradients).train_steps
        static = {} if loop == "block" else {"static_argnums": 6}
        jitted = jit(train_steps, donate_argnums=(1, 2), **static)
        return jitted.lower(values, state, totals, dataset, plan, number, num_steps).compile(options)

    def program_of(epoch, num_steps):
        length = {"step": 1, "block": number, "epoch": num_steps}[loop]  # one program for blocks of any length
        return steps_program(skipped_gradients(recipe.optim, epoch), length)

    steps = steps_of_epochs(recipe, steps_per_epoch)
    for epoch, num_steps in enumerate(steps, start=1):
        program_of(epoch, num_steps)
    tta_epochs = range(1 if tta_every_epoch else len(steps), len(steps) + 1)
    evaluations = {
        with_tta: jit(f).lower(values, state, dataset).compile()
        for with_tta, f in ((False, functions.evaluate), (True, functions.evaluate_with_tta))
        if with_tta or 1 not in tta_epochs
    }

    def train_steps(epoch, values, dataset, plan, carry, start, num_steps):
        length = (np.int32(num_steps),) if loop == "block" else ()
        return program_of(epoch, num_steps)(values, *carry, dataset, plan, np.int32(start), *length)

    run = CompiledRun(
        init=jit(functions.init).lower(key, dataset).compile(),
        plan=jit(functions.plan).lower(key, number, dataset).compile(),
        train_steps=train_steps,
        finalize_batch_stats=functions.finalize_batch_stats,
        evaluate=lambda epoch, *args: evaluations[epoch in tta_epochs](*args),
        loop=loop,
        steps_per_epoch=steps_per_epoch,
        seconds=0.0,
    )
    if loop == "epoch" and not copies and isinstance(dataset.train_images, jax.Array):
        _warm_up(run, recipe, dataset)
    return run._replace(seconds=time.perf_counter() - began)


def _warm_up(run, recipe, dataset):
    """An initialisation, an epoch and an evaluation that are thrown away: an accelerator loads its kernels meanwhile.

    The originals warm up, too. Whole epochs, since that is what the program of an accelerator runs.
    """
    values, key = hparams(recipe), jax.random.key(0)
    carry, plan = (run.init(key, dataset), zero_totals(recipe)), run.plan(key, np.int32(1), dataset)
    state, _ = run.train_steps(1, values, dataset, plan, carry, 0, steps_of_epochs(recipe, run.steps_per_epoch)[0])
    jax.block_until_ready(run.evaluate(1, values, state, dataset))


def train_epochs(
    recipe: Recipe,
    num_classes: int,
    key: PRNGKeyArray,
    dataset: Dataset,
    *,
    compiled: CompiledRun | None = None,
    resume: Snapshot | None = None,
    on_steps: OnSteps | None = None,
) -> Iterator[Snapshot]:
    """A run as an iterator: the state and the epoch table after each epoch.

    The same key, recipe, data and kind of device give bitwise the same numbers.

    Args:
      recipe: what to run.
      num_classes: size of the logits.
      key: of the run.
      dataset: on the device.
      compiled: from `compile_run`; None compiles.
      resume: continue after this snapshot of the same run.
      on_steps: called with the epoch and its finished steps about once per second where an epoch is not one call.

    Yields:
      A `Snapshot` per epoch. The next epoch donates its state: copy what is kept.

    Raises:
      Diverged: at the end of an epoch whose loss is not finite.
      ValueError: a recipe that does not fit the data.
    """
    compiled = compiled or compile_run(recipe, num_classes, dataset)
    values = hparams(recipe)
    key_init, key_data = jax.random.split(key)
    if resume is None:
        began = time.perf_counter()
        state = jax.block_until_ready(compiled.init(key_init, dataset))
        resume = Snapshot(state, (), time.perf_counter() - began)
    state, rows, setup_seconds = resume
    steps = steps_of_epochs(recipe, compiled.steps_per_epoch)
    for epoch, num_steps in list(enumerate(steps, start=1))[len(rows) :]:
        began = time.perf_counter()
        plan = compiled.plan(key_data, np.int32(epoch), dataset)
        run_steps = functools.partial(compiled.train_steps, epoch, values, dataset, plan)
        report = None if on_steps is None else functools.partial(on_steps, epoch)
        state, totals = _train_epoch(run_steps, compiled.loop, (state, zero_totals(recipe)), num_steps, report)
        seconds = time.perf_counter() - began
        state = compiled.finalize_batch_stats(state, epoch)
        loss, accuracy = (x.item() / (num_steps * recipe.batch_size) for x in totals)
        sums = compiled.evaluate(epoch, values, state, dataset)
        test: list[Any] = [None if x is None else x.item() / len(dataset.test_labels) for x in sums]
        rows = (*rows, EpochInfo(epoch, seconds, loss, accuracy, *test))
        if not (math.isfinite(loss) and math.isfinite(rows[-1].test_loss)):
            raise Diverged(recipe.name, rows)
        yield Snapshot(state, rows, setup_seconds)


def _train_epoch(run_steps, loop, carry, num_steps, report):
    """All steps of an epoch in one call, or in blocks of about `BLOCK_SECONDS`, which change no number."""
    done, block = 0, num_steps if loop == "epoch" else 1
    while done < num_steps:
        began = time.perf_counter()
        count = min(block, num_steps - done)
        carry = jax.block_until_ready(run_steps(carry, done, count))
        done += count
        if loop == "block":
            block = max(1, int(BLOCK_SECONDS * count / (time.perf_counter() - began)))
        if report is not None:
            report(done)
    return carry


def make_train(recipe: Recipe, num_classes: int) -> Callable[[PRNGKeyArray, Dataset], RunResult]:
    """A whole run as a function of a key and a data set: `train(key, dataset) -> RunResult`.

    The first call compiles; later ones with data of the same shapes do not. `train` raises what `train_epochs` raises.

    Args:
      recipe: what to run.
      num_classes: size of the logits.
    """
    programs: dict[tuple, CompiledRun] = {}

    def train(key: PRNGKeyArray, dataset: Dataset) -> RunResult:
        shapes = tuple((array.shape, str(array.dtype)) for array in dataset)
        compile_seconds = 0.0
        if shapes not in programs:
            programs[shapes] = compile_run(recipe, num_classes, dataset)
            compile_seconds = programs[shapes].seconds
        *_, last = train_epochs(recipe, num_classes, key, dataset, compiled=programs[shapes])
        return run_result(recipe, len(dataset.train_labels), last, compile_seconds)

    return train


def run_result(recipe: Recipe, num_train: int, last: Snapshot, compile_seconds: float) -> RunResult:
    """What a run on `num_train` images comes to, from its last snapshot."""
    num_images = count_steps(recipe.num_epochs, num_train // recipe.batch_size) * recipe.batch_size
    rate = num_images / sum(row.train_seconds for row in last.epochs)
    return RunResult(last.state, last.epochs, last.setup_seconds, compile_seconds, rate)
