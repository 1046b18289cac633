"""The package's side of a comparison: recipes at the size of a case, and their trajectories.

Compiling takes most of the time, so recipes whose steps differ only in numbers of loss, optimiser and schedule share a
program that takes these numbers as arguments, and recipes with the same network share its predictions.
"""

import functools
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fastcifar_jax.augment import IndependentSampling, normalize
from fastcifar_jax.functions import eval_variables, make_functions
from fastcifar_jax.hparams import hparams, program_key, with_hparams
from fastcifar_jax.muon import Muon
from fastcifar_jax.ops import backend
from fastcifar_jax.optim import AirbenchSGD, Nesterov
from fastcifar_jax.recipe import Published, Recipe
from fastcifar_jax.schedules import count_steps
from fastcifar_jax.train_step import make_train_step
from fastcifar_jax.types import Batch, TrainState, flatten_by_path
from tests.reference import problem
from tests.reference.problem import Case, Trajectory


def reduced(recipe: Recipe, case: Case, dtype: str = "float64") -> Recipe:
    """The recipe at the case's size, all in one dtype; recipes that differ only in augmentation become equal."""
    optim = replace(recipe.optim, compute_dtype=None) if isinstance(recipe.optim, Muon) else recipe.optim
    return replace(
        recipe,
        name="reduced",
        published=Published(),
        num_epochs=case.num_epochs or recipe.num_epochs,
        batch_size=case.batch_size,
        augmentations=(),
        sampling=IndependentSampling(),
        model=recipe.model.with_width(case.width),
        optim=optim,
        compute_dtype=dtype,
    )


def fast_jit(f):
    """XLA:CPU compiles a step in 3 s instead of 4 without its fusion emitters, where it has that option."""
    return jax.jit(f, compiler_options=backend.known_options({"xla_cpu_use_fusion_emitters": False}))


def flat(*trees) -> dict[str, np.ndarray]:
    """Path -> NumPy array, over nested dicts whose paths differ; leaves masked out by optax are left out."""
    return {path: np.asarray(x) for tree in trees for path, x in flatten_by_path(tree).items()}


class Run(NamedTuple):
    """A run of the package on the batches of a case."""

    losses: list[float]
    correct: list[int]
    before: list[dict[str, np.ndarray]]  # the weights before each step
    state: TrainState


@functools.cache
def train_jax(recipe: Recipe, case: Case, from_jax_init: bool = False) -> Run:
    """Trains the package's network.

    Args:
      recipe: from `reduced`.
      case: how many steps, on what.
      from_jax_init: start from the network's own initialisation, whitening filters included, instead of the weights
        that need no JAX.
    """
    with jax.enable_x64(recipe.compute_dtype == "float64"):
        batches = [Batch(_images(recipe, pixels), jnp.asarray(labels)) for pixels, labels in problem.batches(case)]
        model = recipe.model(problem.NUM_CLASSES, recipe.compute_dtype)
        if from_jax_init:
            # XLA takes 9 s to compile the default generator's bits for every kernel, 1 s for these.
            variables = fast_jit(model.init)(jax.random.key(0, impl="rbg"), batches[0].images)
        else:
            shapes = jax.eval_shape(model.init, jax.random.key(0), batches[0].images)
            by_path = {name: flatten_by_path(tree) for name, tree in shapes.items()}
            weights = problem.initial_weights(
                {path: x.shape for arrays in by_path.values() for path, x in arrays.items()}
            )
            variables = {
                name: jax.tree.unflatten(
                    jax.tree.structure(shapes[name]), [jnp.asarray(weights[p], x.dtype) for p, x in arrays.items()]
                )
                for name, arrays in by_path.items()
            }
        params, batch_stats = variables["params"], variables["batch_stats"]
        average = () if recipe.average is None else recipe.average.init({"params": params, "batch_stats": batch_stats})
        opt_state = recipe.optim(recipe.num_epochs, case.steps_per_epoch, case.batch_size).init(params)
        state = TrainState(jnp.int32(0), params, variables["constants"], batch_stats, opt_state, average)

        step = functools.partial(_step_program(_numbers_left_out(recipe), case), recipe.num_epochs, hparams(recipe))
        functions = make_functions(recipe, problem.NUM_CLASSES, case.steps_per_epoch * case.batch_size)
        run = Run([], [], [], state)
        for index, batch in enumerate(batches, start=1):
            run.before.append(flat(state.params, state.constants, state.batch_stats))
            state, info = step(state, batch)
            run.losses.append(float(info.loss))
            run.correct.append(int(info.correct))
            if index % case.steps_per_epoch == 0:
                state = functions.finalize_batch_stats(state, index // case.steps_per_epoch)
        return run._replace(state=state)


def trajectory(recipe: Recipe, case: Case, from_jax_init: bool = False) -> Trajectory:
    """What such a run leaves behind, with its predictions; velocities as PyTorch's optimisers have them."""
    losses, correct, _, state = train_jax(recipe, case, from_jax_init)
    with jax.enable_x64(recipe.compute_dtype == "float64"):
        predict = functools.partial(_predictions(recipe.model, recipe.compute_dtype), eval_variables(state))
        x = _images(recipe, problem.held_out(case))
        logits, tta_logits = np.asarray(predict(x)), np.asarray(recipe.tta(predict, x))
    # PyTorch has the factor of the biases in their rate, and stops the velocity of a whitening bias when it freezes it.
    scaled = lambda path: isinstance(recipe.optim, AirbenchSGD) and path.endswith("norm/bias")
    velocity = flat(*(trace for _, trace in optax.tree.get_all_with_path(state.opt_state, "trace")))
    velocity = {path: x / recipe.optim.bias_scale if scaled(path) else x for path, x in velocity.items()}
    velocity.pop("whiten/bias", None)
    weights, average = flat(state.params, state.constants, state.batch_stats), flat(*(state.average or {}).values())
    return Trajectory(losses, correct, weights, velocity, average, logits, tta_logits)


def _images(recipe, pixels):
    return normalize(jnp.asarray(pixels), recipe.mean, recipe.std, jnp.dtype(recipe.compute_dtype))


class _ByKey(NamedTuple):
    """A recipe that is equal to another if their steps are one program with other numbers."""

    key: str
    recipe: Recipe

    def __eq__(self, other):
        return self.key == other.key

    def __hash__(self):
        return hash(self.key)


def _numbers_left_out(recipe: Recipe) -> _ByKey:
    length = 100 if isinstance(recipe.optim, Nesterov) else recipe.num_epochs  # its schedule is linear in the length
    return _ByKey(f"{program_key(replace(recipe, num_epochs=length, tta=None))} {recipe.model!r}", recipe)


@functools.cache
def _step_program(like: _ByKey, case: Case):
    """`step(num_epochs, values, state, batch)`, compiled once for all recipes with the key of `like`."""
    recipe = like.recipe
    model = recipe.model(problem.NUM_CLASSES, recipe.compute_dtype)
    num_steps = count_steps(recipe.num_epochs, case.steps_per_epoch)

    def step(num_epochs, values, state, batch):
        traced = with_hparams(recipe, values)
        num_epochs = num_epochs if isinstance(recipe.optim, Nesterov) else recipe.num_epochs
        tx = traced.optim(num_epochs, case.steps_per_epoch, case.batch_size)
        return make_train_step(model, traced.loss, tx, recipe.average, case.steps_per_epoch, num_steps)(state, batch)

    return fast_jit(step)


@functools.cache
def _predictions(network, compute_dtype):
    model = network(problem.NUM_CLASSES, compute_dtype)
    return fast_jit(lambda variables, images: model.apply(variables, images, False)[0])
