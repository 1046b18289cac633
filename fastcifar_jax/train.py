"""Training as pure functions, and the two loops that drive them."""

import functools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int, PRNGKeyArray

from fastcifar_jax.augment import EpochPlan, augment, normalize, plan_epoch
from fastcifar_jax.evaluate import evaluate
from fastcifar_jax.models.base import PRECISIONS
from fastcifar_jax.ops.backend import Driver, compiler_options, default_driver
from fastcifar_jax.ops.batch_norm import share_of_batch
from fastcifar_jax.optim import skipped_gradients
from fastcifar_jax.recipe import Recipe, resolve_dtype
from fastcifar_jax.schedules import count_steps
from fastcifar_jax.train_step import TrainStep, make_train_step
from fastcifar_jax.tunable import Values, program_key, tunable, with_tunable
from fastcifar_jax.types import Batch, Dataset, EpochInfo, Evaluation, RunResult, Snapshot, StepInfo, TrainState


class Diverged(ArithmeticError):
    """A loss that is not finite.

    Attributes:
      epochs: the rows of the epoch table up to and with the one that failed.
    """

    def __init__(self, name: str, epochs: tuple[EpochInfo, ...]):
        last = epochs[-1]
        super().__init__(
            f"{name} diverged in epoch {last.epoch}: training loss {last.train_loss}, test loss {last.test_loss}; "
            "lower optim.peak_lr"
        )
        self.epochs = epochs


class TrainFunctions(NamedTuple):
    """The pure functions of one recipe; none is jitted."""

    init: Callable[[PRNGKeyArray, Dataset], TrainState]
    plan: Callable[[PRNGKeyArray, Int[Array, ""], Dataset], EpochPlan]  # (key of the run, epoch, dataset)
    train_step: TrainStep
    train_batch: Callable[[TrainState, StepInfo, Dataset, EpochPlan, Int[Array, ""]], tuple[TrainState, StepInfo]]
    train_epoch: Callable[[TrainState, Dataset, EpochPlan, Int[Array, ""]], tuple[TrainState, StepInfo]]  # ..., steps
    finalize_batch_stats: Callable[[TrainState, int], TrainState]  # (state, epoch), 1-based
    evaluate: Callable[[TrainState, Dataset], Evaluation]


def eval_variables(state: TrainState) -> dict[str, Any]:
    """The variables that evaluation uses: the averaged ones, if the recipe has an average."""
    trained = state.average or {"params": state.params, "batch_stats": state.batch_stats}
    return {**trained, "constants": state.constants}


def make_functions(
    recipe: Recipe, num_classes: int, num_train: int, axis_name: str | None = None, skip_gradients: str | None = None
) -> TrainFunctions:
    """The pure functions that make up a run of `recipe`.

    Args:
      recipe: what to run.
      num_classes: size of the logits.
      num_train: number of training images.
      axis_name: mesh axis whose devices each train on a share of every batch, inside `jax.shard_map`; None for one
        device.
      skip_gradients: pattern of the paths of parameters that are not trained, see `skipped_gradients`.

    Raises:
      ValueError: fewer training images than one batch, or a batch that the network cannot split.
    """
    recipe = resolve_dtype(recipe)
    batch_size = recipe.batch_size
    steps_per_epoch = num_train // batch_size
    if not steps_per_epoch:
        raise ValueError(f"batch_size {batch_size} is larger than the {num_train} training images; set it lower")
    model = recipe.model(num_classes, recipe.compute_dtype)
    if axis_name is not None:
        if model.split is None:
            raise ValueError(f"the network of {recipe.name!r} has no `split`; give it one, or run on one device a seed")
        model = model.split(axis_name)
    tx = recipe.optim(recipe.num_epochs, steps_per_epoch, batch_size)
    num_steps = count_steps(recipe.num_epochs, steps_per_epoch)
    train_step = make_train_step(
        model, recipe.loss, tx, recipe.average, steps_per_epoch, num_steps, axis_name, skip_gradients
    )
    image_dtype = PRECISIONS[recipe.compute_dtype].images
    as_images = functools.partial(normalize, mean=recipe.mean, std=recipe.std, dtype=image_dtype)

    def init(key, dataset):
        images = normalize(dataset.train_images[: recipe.init_images], recipe.mean, recipe.std)
        variables = model.init(key, images)
        params, batch_stats = variables["params"], variables["batch_stats"]
        average = () if recipe.average is None else recipe.average.init({"params": params, "batch_stats": batch_stats})
        return TrainState(jnp.int32(0), params, variables["constants"], batch_stats, tx.init(params), average)

    def plan(key, epoch, dataset):
        num_images, height, width, _ = dataset.train_images.shape
        return plan_epoch(key, epoch, recipe.sampling, recipe.augmentations, num_images, height, width)

    def train_batch(state, totals, dataset, plan, index):
        ids = lax.dynamic_slice(plan.order, (index * batch_size,), (batch_size,))
        if axis_name is not None:
            ids = share_of_batch(ids, model.num_groups, axis_name)
        images = as_images(dataset.train_images[ids])
        images = augment(images, recipe.augmentations, tuple(choice[ids] for choice in plan.choices))
        state, info = train_step(state, Batch(images, dataset.train_labels[ids]))
        return state, jax.tree.map(jnp.add, totals, info)

    def train_epoch(state, dataset, plan, num_steps):
        # The number is traced: the last epoch of a recipe may be a part of one, and must not be compiled again.
        step = lambda index, carry: train_batch(*carry, dataset, plan, index)
        return lax.fori_loop(jnp.int32(0), num_steps, step, (state, zero_totals(recipe)))

    def finalize_batch_stats(state, epoch):
        # The network itself leaves training mode after every epoch, its average once and for good after the first.
        if recipe.average is None:
            return state._replace(batch_stats=model.finalize_batch_stats(state.batch_stats))
        if epoch == 1:
            batch_stats = model.finalize_batch_stats(state.average["batch_stats"])
            return state._replace(average={**state.average, "batch_stats": batch_stats})
        return state

    def evaluate_state(state, dataset):
        variables = eval_variables(state)
        predict = lambda images: model.apply(variables, images, False)[0]
        return evaluate(
            predict, recipe.loss, recipe.tta, dataset.test_images, dataset.test_labels,
            recipe.mean, recipe.std, image_dtype,
        )  # fmt: skip

    return TrainFunctions(init, plan, train_step, train_batch, train_epoch, finalize_batch_stats, evaluate_state)


def zero_totals(recipe: Recipe) -> StepInfo:
    """The sums of an epoch before its first step."""
    return StepInfo(jnp.zeros((), jnp.float64 if recipe.compute_dtype == "float64" else jnp.float32), jnp.int32(0))


class Shapes(NamedTuple):
    """Shapes and dtypes of what a run's functions take."""

    key: jax.ShapeDtypeStruct
    index: jax.ShapeDtypeStruct  # type: ignore[assignment]  # a tuple's method in the class above
    state: TrainState
    totals: StepInfo
    plan: EpochPlan


def shapes_of(functions: TrainFunctions, recipe: Recipe, dataset: Dataset) -> Shapes:
    """Traces `init` and `plan` without compiling them."""
    chex.assert_rank((dataset.train_images, dataset.test_images), 4)
    chex.assert_equal_shape_prefix((dataset.train_images, dataset.train_labels), 1)
    chex.assert_equal_shape_prefix((dataset.test_images, dataset.test_labels), 1)
    chex.assert_type((dataset.train_images, dataset.test_images), jnp.uint8)
    key = jax.eval_shape(lambda: jax.random.key(0))
    index = jax.ShapeDtypeStruct((), jnp.int32)
    state = jax.eval_shape(functions.init, key, dataset)
    plan = jax.eval_shape(functions.plan, key, index, dataset)
    return Shapes(key, index, state, jax.eval_shape(lambda: zero_totals(recipe)), plan)


def check(recipe: Recipe, num_classes: int, dataset: Dataset) -> None:
    """Traces a whole run without compiling it, in a fraction of a second.

    Raises:
      ValueError: a recipe that does not fit the data or the machine.
    """
    if recipe.compute_dtype == "float64" and not jax.config.read("jax_enable_x64"):
        raise ValueError("float64 needs JAX's 64-bit mode; set the environment variable JAX_ENABLE_X64=1")
    functions = make_functions(recipe, num_classes, len(dataset.train_labels))
    shapes = shapes_of(functions, recipe, dataset)
    jax.eval_shape(functions.train_batch, shapes.state, shapes.totals, dataset, shapes.plan, shapes.index)
    jax.eval_shape(functions.evaluate, shapes.state, dataset)


def steps_of_epochs(recipe: Recipe, steps_per_epoch: int) -> list[int]:
    """How many steps each epoch of a run has: all but the last `steps_per_epoch`."""
    num_steps = count_steps(recipe.num_epochs, steps_per_epoch)
    return [min(steps_per_epoch, num_steps - done) for done in range(0, num_steps, steps_per_epoch)]


class CompiledRun(NamedTuple):
    """A recipe's functions compiled for one data set's shapes, and for all recipes with the same `program_key`.

    `values` are the `tunable` numbers of the recipe that is run.
    """

    init: Callable[[Values, PRNGKeyArray, Dataset], TrainState]
    plan: Callable[[PRNGKeyArray, Int[Array, ""] | np.int32, Dataset], EpochPlan]
    train_epoch: Callable[..., tuple[TrainState, StepInfo]]  # (values, state, dataset, plan, epoch, num_steps, on_step)
    finalize_batch_stats: Callable[[TrainState, int], TrainState]
    evaluate: Callable[[Values, TrainState, Dataset], Evaluation]
    steps_per_epoch: int


def with_values(
    recipe: Recipe, num_classes: int, num_train: int, axis_name: str | None = None, skip_gradients: str | None = None
) -> Callable:
    """The functions of `make_functions` as functions of the recipe's tunable numbers too.

    Args:
      recipe: as for `make_functions`, with the other arguments.
      num_classes: size of the logits.
      num_train: number of training images.
      axis_name: mesh axis whose devices each train on a share of every batch.
      skip_gradients: pattern of the paths of parameters that are not trained.

    Returns:
      `function(name)`: the function of that name, with `values` before its own arguments.
    """
    recipe = resolve_dtype(recipe)

    def function(name):
        def call(values, *args):
            functions = make_functions(with_tunable(recipe, values), num_classes, num_train, axis_name, skip_gradients)
            return getattr(functions, name)(*args)

        return call

    return function


def compile_programs(recipe: Recipe, num_classes: int, dataset: Dataset, driver: Driver) -> CompiledRun:
    """Compiles everything that a run needs, ahead of its first step.

    Args:
      recipe: what to run.
      num_classes: size of the logits.
      dataset: arrays or `jax.ShapeDtypeStruct`s.
      driver: "python" compiles one step, "scan" one epoch.

    Raises:
      ValueError: a recipe that does not fit the data.
    """
    num_train = len(dataset.train_labels)
    functions = make_functions(recipe, num_classes, num_train)
    key, index, state, totals, plan = shapes_of(functions, recipe, dataset)
    values, function = tunable(recipe), with_values(recipe, num_classes, num_train)
    # Epochs that train fewer parameters have a program of their own, which computes less.
    frozen = [skipped_gradients(recipe.optim, epoch) for epoch in range(1, math.ceil(recipe.num_epochs) + 1)]
    trainers = {
        name: with_values(recipe, num_classes, num_train, skip_gradients=name) for name in dict.fromkeys(frozen)
    }
    options = compiler_options()

    if driver == "scan":
        jitted = {name: jax.jit(trainer("train_epoch"), donate_argnums=1) for name, trainer in trainers.items()}
        programs = {
            name: epoch.lower(values, state, dataset, plan, index).compile(options) for name, epoch in jitted.items()
        }

        def train_epoch(values, state, dataset, plan, epoch, num_steps, on_step):
            del on_step  # nothing is seen from outside before the epoch ends
            return programs[frozen[epoch - 1]](values, state, dataset, plan, np.int32(num_steps))

    else:
        jitted = {name: jax.jit(trainer("train_batch"), donate_argnums=(1, 2)) for name, trainer in trainers.items()}
        lower = lambda step: step.lower(values, state, totals, dataset, plan, index)
        programs = {name: lower(step).compile(options) for name, step in jitted.items()}

        def train_epoch(values, state, dataset, plan, epoch, num_steps, on_step):
            totals = zero_totals(recipe)
            for i in range(num_steps):
                state, totals = programs[frozen[epoch - 1]](values, state, totals, dataset, plan, np.int32(i))
                if on_step is not None:
                    on_step(i + 1, jax.block_until_ready(totals))
            return state, totals

    return CompiledRun(
        init=jax.jit(function("init")).lower(values, key, dataset).compile(),
        plan=jax.jit(functions.plan).lower(key, index, dataset).compile(),
        train_epoch=train_epoch,
        finalize_batch_stats=functions.finalize_batch_stats,
        evaluate=jax.jit(function("evaluate")).lower(values, state, dataset).compile(),
        steps_per_epoch=num_train // recipe.batch_size,
    )


def make_train(
    recipe: Recipe, num_classes: int, driver: Driver | None = None, compiled: dict[tuple, CompiledRun] | None = None
) -> Callable[..., RunResult]:
    """The run of a recipe as a function of a key and a data set.

    Same key, recipe, data and kind of device: bitwise the same numbers.

    Args:
      recipe: what to run.
      num_classes: size of the logits.
      driver: "python" calls a compiled step, "scan" a compiled epoch; None picks by platform.
      compiled: programs to use and to add to, shared by the recipes of a sweep; None keeps them for this one alone.

    Returns:
      `train(key, dataset, on_epoch=None, on_step=None, on_compiled=None, resume=None, on_snapshot=None) -> RunResult`.
      `on_epoch` is called with each finished `EpochInfo`; `on_step(epoch, step, totals)` by the "python" driver after
      each step; `on_compiled(seconds)` before the first; `on_snapshot` before `on_epoch` with a `Snapshot`, from which
      another call goes on that gets it as `resume`. The next epoch donates a snapshot's state: copy what is kept.
      The first call compiles, later ones with data of the same shapes do not. `train` raises `Diverged` at the end of
      an epoch whose loss is not finite, and ValueError for a recipe that does not fit the data.
    """
    driver = driver or default_driver()
    compiled = {} if compiled is None else compiled
    values = tunable(recipe)

    def train(
        key: PRNGKeyArray,
        dataset: Dataset,
        on_epoch: Callable[[EpochInfo], None] | None = None,
        on_step: Callable[[int, int, StepInfo], None] | None = None,
        on_compiled: Callable[[float], None] | None = None,
        resume: Snapshot | None = None,
        on_snapshot: Callable[[Snapshot], None] | None = None,
    ) -> RunResult:
        key_of_program = (program_key(recipe), num_classes, driver, *((a.shape, str(a.dtype)) for a in dataset))
        compile_seconds = 0.0
        if key_of_program not in compiled:
            start = time.perf_counter()
            compiled[key_of_program] = compile_programs(recipe, num_classes, dataset, driver)
            compile_seconds = time.perf_counter() - start
        programs = compiled[key_of_program]
        if on_compiled is not None:
            on_compiled(compile_seconds)

        key_init, key_data = jax.random.split(key)
        if resume is None:
            start = time.perf_counter()
            state = jax.block_until_ready(programs.init(values, key_init, dataset))
            resume = Snapshot(state, (), time.perf_counter() - start)
        state, rows, setup_seconds = resume
        epochs = list(rows)
        left = steps_of_epochs(recipe, programs.steps_per_epoch)[len(epochs) :]
        for epoch, num_steps in enumerate(left, start=len(epochs) + 1):
            start = time.perf_counter()
            plan = programs.plan(key_data, np.int32(epoch), dataset)
            step_seen = None if on_step is None else functools.partial(on_step, epoch)
            trained = programs.train_epoch(values, state, dataset, plan, epoch, num_steps, step_seen)
            state, totals = jax.block_until_ready(trained)
            seconds = time.perf_counter() - start
            state = programs.finalize_batch_stats(state, epoch)
            loss, accuracy = (x.item() / (num_steps * recipe.batch_size) for x in totals)
            test = [x.item() / len(dataset.test_labels) for x in programs.evaluate(values, state, dataset)]
            epochs.append(EpochInfo(epoch, seconds, loss, accuracy, *test))
            if not (math.isfinite(loss) and math.isfinite(epochs[-1].test_loss)):
                raise Diverged(recipe.name, tuple(epochs))
            if on_snapshot is not None:
                on_snapshot(Snapshot(state, tuple(epochs), setup_seconds))
            if on_epoch is not None:
                on_epoch(epochs[-1])
        num_images = count_steps(recipe.num_epochs, programs.steps_per_epoch) * recipe.batch_size
        rate = num_images / sum(info.train_seconds for info in epochs)
        return RunResult(state, tuple(epochs), setup_seconds, compile_seconds, rate)

    return train
