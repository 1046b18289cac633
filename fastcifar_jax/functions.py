"""The pure functions of a run: initialisation, the plan of an epoch, training steps and evaluation."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, PRNGKeyArray

from fastcifar_jax.augment import EpochPlan, augment, normalize, plan_epoch
from fastcifar_jax.evaluate import evaluate
from fastcifar_jax.hparams import HParams, hparams, with_hparams
from fastcifar_jax.models.base import PRECISIONS
from fastcifar_jax.ops import backend
from fastcifar_jax.recipe import Recipe, resolve_dtype
from fastcifar_jax.schedules import count_steps
from fastcifar_jax.train_step import TrainStep, make_train_step
from fastcifar_jax.types import Batch, Dataset, Evaluation, Images, StepInfo, TrainState


class TrainFunctions(NamedTuple):
    """The pure functions of one recipe; none is jitted."""

    init: Callable[[PRNGKeyArray, Dataset], TrainState]
    plan: Callable[[PRNGKeyArray, Int[Array, ""], Dataset], EpochPlan]  # (key of the run, epoch, dataset)
    train_step: TrainStep  # with the recipe's own numbers
    train_steps: Callable[..., tuple[TrainState, StepInfo]]
    finalize_batch_stats: Callable[[TrainState, int], TrainState]  # (state, epoch), 1-based
    evaluate: Callable[[HParams, TrainState, Dataset], Evaluation]
    evaluate_with_tta: Callable[[HParams, TrainState, Dataset], Evaluation]


def eval_variables(state: TrainState) -> dict[str, Any]:
    """The variables that evaluation uses: the averaged ones if the recipe has an average."""
    trained = state.average or {"params": state.params, "batch_stats": state.batch_stats}
    return {**trained, "constants": state.constants}


def make_functions(
    recipe: Recipe, num_classes: int, num_train: int, skip_gradients: str | None = None
) -> TrainFunctions:
    """The pure functions that make up a run of `recipe`.

    Args:
      recipe: what to run.
      num_classes: size of the logits.
      num_train: number of training images.
      skip_gradients: pattern of the paths of parameters that are not trained, see `optim.skipped_gradients`.

    Returns:
      `TrainFunctions`. `train_steps(hparams, state, totals, dataset, plan, start, num_steps)` runs the steps `start` to
      `start + num_steps` (0-based) of an epoch and adds their loss and correct answers to `totals`. A loop is compiled
      with a known trip count if `num_steps` is a Python number, and not at all if that is 1.

    Raises:
      ValueError: fewer training images than one batch, or a batch that the devices cannot share.
    """
    recipe, batch_size = resolve_dtype(recipe), recipe.batch_size
    if not (steps_per_epoch := num_train // batch_size):
        raise ValueError(f"batch_size {batch_size} is larger than the {num_train} training images; set it lower")
    model = recipe.model(num_classes, recipe.compute_dtype)
    dtype = PRECISIONS[recipe.compute_dtype].images
    as_images = functools.partial(normalize, mean=recipe.mean, std=recipe.std, dtype=dtype)

    def transformation(recipe):
        return recipe.optim(recipe.num_epochs, steps_per_epoch, batch_size)

    def train_step_with(values):
        traced = with_hparams(recipe, values)
        num_steps = count_steps(recipe.num_epochs, steps_per_epoch)
        parts = model, traced.loss, transformation(traced), recipe.average
        return make_train_step(*parts, steps_per_epoch, num_steps, skip_gradients)

    def init(key, dataset):
        images = normalize(dataset.train_images[: recipe.init_images], recipe.mean, recipe.std)
        variables = model.init(key, images)
        trained = {"params": variables["params"], "batch_stats": variables["batch_stats"]}
        opt_state = transformation(recipe).init(trained["params"])
        average = () if recipe.average is None else recipe.average.init(trained)
        return TrainState(jnp.int32(0), **variables, opt_state=opt_state, average=average)

    def train_steps(values, state, totals, dataset, plan, start, num_steps):
        train_step = train_step_with(values)

        def step(i, carry):
            state, totals = carry
            ids = lax.dynamic_slice(plan.order, ((start + i) * batch_size,), (batch_size,))
            images = as_images(dataset.train_images[ids])
            images = augment(images, recipe.augmentations, tuple(choice[ids] for choice in plan.choices))
            state, info = train_step(state, Batch(over_devices(images), dataset.train_labels[ids]))
            return state, jax.tree.map(jnp.add, totals, info)

        if isinstance(num_steps, int) and num_steps == 1:
            return step(0, (state, totals))
        return lax.fori_loop(0, num_steps, step, (state, totals))

    evaluate_state = functools.partial(_evaluate_state, recipe, model, as_images)
    return TrainFunctions(
        init=init,
        plan=functools.partial(_plan, recipe),
        train_step=train_step_with(hparams(recipe)),
        train_steps=train_steps,
        finalize_batch_stats=functools.partial(_finalize_batch_stats, model),
        evaluate=functools.partial(evaluate_state, None),
        evaluate_with_tta=functools.partial(evaluate_state, recipe.tta),
    )


def _plan(recipe, key, epoch, dataset):
    num_images, height, width, _ = dataset.train_images.shape
    return plan_epoch(key, epoch, recipe.sampling, recipe.augmentations, num_images, height, width)


def _evaluate_state(recipe, model, as_images, tta, values, state, dataset):
    variables = eval_variables(state)
    predict = lambda images: model.apply(variables, images, False)[0]
    loss = with_hparams(recipe, values).loss
    return evaluate(predict, loss, tta, as_images, dataset.test_images, dataset.test_labels)


def _finalize_batch_stats(model, state, epoch):
    # The network leaves training mode after every epoch, its average only once, after the first.
    if not state.average:
        return state._replace(batch_stats=model.finalize_batch_stats(state.batch_stats))
    if epoch == 1:
        batch_stats = model.finalize_batch_stats(state.average["batch_stats"])
        return state._replace(average={**state.average, "batch_stats": batch_stats})
    return state


def over_devices(images: Images) -> Images:
    """Spreads a batch over the devices of the mesh that `jax.set_mesh` has set, along its axis "batch".

    XLA partitions everything computed from the batch; gradients and statistics become sums over the devices.

    Raises:
      ValueError: a batch that is not a multiple of the devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return images
    if len(images) % mesh.shape["batch"]:
        raise ValueError(
            f"a batch of {len(images)} images cannot be split evenly over {mesh.shape['batch']} devices; make "
            f"batch_size a multiple of {mesh.shape['batch']}, or use fewer devices"
        )
    return lax.with_sharding_constraint(images, P("batch"))


def zero_totals(recipe: Recipe) -> StepInfo:
    """The sums of an epoch before its first step."""
    dtype = np.float64 if recipe.compute_dtype == "float64" else np.float32
    zeros: tuple[Any, Any] = (np.zeros((), dtype), np.int32(0))  # NumPy arrays, which are on no device yet
    return StepInfo(*zeros)


def steps_of_epochs(recipe: Recipe, steps_per_epoch: int) -> list[int]:
    """The number of steps in each epoch of a run: `steps_per_epoch` in all but the last, which may have fewer."""
    num_steps = count_steps(recipe.num_epochs, steps_per_epoch)
    return [min(steps_per_epoch, num_steps - done) for done in range(0, num_steps, steps_per_epoch)]


class Shapes(NamedTuple):
    """Shapes and dtypes of the arguments of a run's functions."""

    key: jax.ShapeDtypeStruct
    number: jax.ShapeDtypeStruct  # of an epoch or a step
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
    number = jax.ShapeDtypeStruct((), jnp.int32)
    state = jax.eval_shape(functions.init, key, dataset)
    plan = jax.eval_shape(functions.plan, key, number, dataset)
    return Shapes(key, number, state, jax.eval_shape(lambda: jax.tree.map(jnp.asarray, zero_totals(recipe))), plan)


def check_trainable(recipe: Recipe, num_classes: int, dataset: Dataset) -> None:
    """Traces a whole run without compiling it, in a fraction of a second.

    Raises:
      ValueError: a recipe that does not fit the data or the machine.
    """
    backend.check_dtype(recipe.compute_dtype)
    functions = make_functions(recipe, num_classes, len(dataset.train_labels))
    _, number, state, totals, plan = shapes_of(functions, recipe, dataset)
    values = hparams(recipe)
    try:
        jax.eval_shape(functions.train_steps, values, state, totals, dataset, plan, number, number)
    except jax.errors.ConcretizationTypeError as error:
        raise ValueError(
            f"a part of recipe {recipe.name!r} needs the value of a number that is traced ({', '.join(values)}): mark "
            f'its field with metadata={{"static": True}}, or use jnp.where instead of if. {error}'
        ) from error
    jax.eval_shape(functions.evaluate_with_tta, values, state, dataset)
