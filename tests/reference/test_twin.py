"""Every recipe against an independent twin: PyTorch itself where it is installed, its golden numbers everywhere.

Trajectories are compared in float64, where a difference is a mistake and not rounding. The twin and the cases are in
`tests/reference/`.
"""

import functools
import json
import pathlib
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.bag_of_tricks import RECIPES
from fastcifar_jax.augment import IndependentSampling, normalize
from fastcifar_jax.models.base import Model
from fastcifar_jax.models.whitening import patch_moments, whitening_filters
from fastcifar_jax.ops.backend import known_options
from fastcifar_jax.recipe import Published, Recipe
from fastcifar_jax.train import eval_variables, make_functions
from fastcifar_jax.types import Batch, TrainState
from tests.reference import problem
from tests.reference.problem import EPOCHS, LADDER, Case, Trajectory

BY_NAME = {recipe.name: recipe for recipe in RECIPES}
GOLDEN = {
    name: json.loads((pathlib.Path(__file__).parent / f"golden/{name}.json").read_text())
    for name in ("ladder", "epochs", "whitening")
}
CASES = {"ladder": LADDER, "epochs": EPOCHS}
# These tests spend their time in XLA, which compiles a step in 3 s instead of 4 without its fusion emitters. (At
# optimisation level 0 it would take 2.5 s, but the three epochs would run five times as long.)
fast_jit = functools.partial(jax.jit, compiler_options=known_options({"xla_cpu_use_fusion_emitters": False}))


def reduced(recipe: Recipe, case: Case, dtype: str = "float64") -> Recipe:
    """The recipe at the case's size; recipes that differ only in augmentation become equal."""
    return replace(
        recipe,
        name="reduced",
        published=Published(),
        num_epochs=case.num_epochs or recipe.num_epochs,
        batch_size=case.batch_size,
        augmentations=(),
        sampling=IndependentSampling(),
        model=recipe.model.with_width(case.width),
        compute_dtype=dtype,
    )


def joined(path) -> str:
    """A tree path as "layer1/block/conv/kernel"."""
    return "/".join(entry.key for entry in path)


def paths(*trees) -> dict:
    """Path -> leaf, over nested dicts whose paths differ; leaves masked out by optax are none."""
    return {joined(path): x for tree in trees for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def flat(*trees) -> dict[str, np.ndarray]:
    """Path -> NumPy array."""
    return {path: np.asarray(x) for path, x in paths(*trees).items()}


@functools.cache
def train_jax(
    recipe: Recipe, case: Case, from_jax_init: bool = False
) -> tuple[Trajectory, list[dict[str, np.ndarray]]]:
    """Trains the package's network on the case's batches.

    Args:
      recipe: as `reduced` returns it.
      case: how many steps, on what.
      from_jax_init: start from the network's own initialisation, whitening filters included, instead of the weights
        that need no JAX.

    Returns:
      The trajectory, and the weights before each step.
    """
    with jax.enable_x64(recipe.compute_dtype == "float64"):
        dtype = jnp.dtype(recipe.compute_dtype)
        images = lambda pixels: normalize(jnp.asarray(pixels), recipe.mean, recipe.std, dtype)
        model = recipe.model(problem.NUM_CLASSES, recipe.compute_dtype)
        params, frozen, batch_stats = start(model, images(problem.batches(case)[0][0]), from_jax_init)

        functions = make_functions(recipe, problem.NUM_CLASSES, case.steps_per_epoch * case.batch_size)
        tx = recipe.optim(recipe.num_epochs, case.steps_per_epoch, case.batch_size)
        average = () if recipe.average is None else recipe.average.init({"params": params, "batch_stats": batch_stats})
        state = TrainState(jnp.int32(0), params, frozen, batch_stats, tx.init(params), average)
        weights = lambda: flat(state.params, state.constants, state.batch_stats)
        train_step = fast_jit(functions.train_step)
        losses, correct, before = [], [], []
        for index, (pixels, labels) in enumerate(problem.batches(case), start=1):
            before.append(weights())
            state, info = train_step(state, Batch(images(pixels), jnp.asarray(labels)))
            losses.append(float(info.loss))
            correct.append(int(info.correct))
            if index % case.steps_per_epoch == 0:
                state = functions.finalize_batch_stats(state, index // case.steps_per_epoch)

        predict = fast_jit(lambda images: model.apply(eval_variables(state), images, False)[0])
        x = images(problem.held_out(case))
        logits, tta_logits = np.asarray(predict(x)), np.asarray(recipe.tta(predict, x))
        velocity = flat(*(trace for _, trace in optax.tree.get_all_with_path(state.opt_state, "trace")))
        averaged = flat(*(state.average or {}).values())
        return Trajectory(losses, correct, weights(), velocity, averaged, logits, tta_logits), before


def start(model: Model, images: jax.Array, from_jax_init: bool):
    """Parameters, frozen arrays and running statistics before the first step."""
    if from_jax_init:
        # XLA takes 9 s to compile the default generator's bits for every kernel, 1 s for these.
        variables = fast_jit(model.init)(jax.random.key(0, impl="rbg"), images)
    else:
        shapes = jax.eval_shape(model.init, jax.random.key(0), images)
        weights = problem.initial_weights({path: x.shape for path, x in paths(*shapes.values()).items()})
        variables = {
            name: jax.tree_util.tree_map_with_path(lambda path, x: jnp.asarray(weights[joined(path)], x.dtype), tree)
            for name, tree in shapes.items()
        }
    return variables["params"], variables["constants"], variables["batch_stats"]


def assert_close(ours: Trajectory, theirs: Trajectory):
    """Float64 agreement to 1e-8 of every number in two trajectories."""
    chex.assert_trees_all_equal_dtypes(ours.weights, theirs.weights)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-8, atol=1e-12)


@pytest.fixture(scope="module")
def twin(torch_on_one_thread):
    """The PyTorch side."""
    from tests.reference import torch_resnet9

    return torch_resnet9


@pytest.mark.parametrize("name", BY_NAME)
def test_recipe_follows_torch(twin, name):
    row = twin.ROWS[name]
    assert BY_NAME[name].num_epochs == row.epochs
    ours, before = train_jax(reduced(BY_NAME[name], LADDER), LADDER)
    assert_close(ours, twin.train_twin(row, LADDER, before[0]))


@pytest.mark.parametrize("name", ["baseline", "final"])
def test_three_epochs_follow_torch(twin, name):
    # From the package's own initialisation, whitening filters included. 20 steps and one more: the last step of a
    # schedule that ends at zero has rate 0 and moves by momentum alone.
    ours, before = train_jax(reduced(BY_NAME[name], EPOCHS), EPOCHS, from_jax_init=True)
    row = twin.shortened(twin.ROWS[name], EPOCHS.num_epochs)
    assert_close(ours, twin.train_twin(row, EPOCHS, before[0]))


@pytest.mark.parametrize("name", ["baseline", "final"])
def test_float32_losses_follow_torch(twin, name):
    # Each step from the package's weights. Left to themselves float32 trajectories part within a few steps, PyTorch's
    # from PyTorch's own float64 too (1e-2 at step 6): rounding turns a maximum or a ReLU over, and gradients jump.
    import torch

    ours, before = train_jax(reduced(BY_NAME[name], EPOCHS, "float32"), EPOCHS)
    row = twin.shortened(twin.ROWS[name], EPOCHS.num_epochs)
    np.testing.assert_allclose(ours.losses, twin.losses_at(row, EPOCHS, before, torch.float32), rtol=1e-4)


VARIANTS = {
    "ghost_norm": {"eval_first_group": True},  # merges when the network itself is evaluated, after every epoch
    "final": {"eval_first_group": True},  # merges its average once, after the first epoch, and then reads group 0
    "frozen_scales": {"extra_layers": ("layer1", "layer2", "layer3"), "res_layers": ("layer2",)},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_follows_torch(twin, name):
    case, changes = Case(num_steps=6, steps_per_epoch=2, num_epochs=3), VARIANTS[name]
    recipe = reduced(BY_NAME[name], case)
    if "eval_first_group" in changes:
        model = replace(recipe.model, norm=replace(recipe.model.norm, eval_first_group=True))
    else:
        model = replace(recipe.model, **changes)
    ours, before = train_jax(replace(recipe, model=model), case)
    row = twin.shortened(twin.ROWS[name], case.num_epochs)._replace(**changes)
    assert_close(ours, twin.train_twin(row, case, before[0]))


def whitening(twin_order: bool = False):
    """Filters and patch moments as matrices, features (row, column, channel) or, as in the twin, channel first."""
    with jax.enable_x64(True):
        recipe = BY_NAME["final"]
        images = normalize(jnp.asarray(problem.whitening_images()), recipe.mean, recipe.std, jnp.float64)
        filters, moments = np.asarray(whitening_filters(images)), np.asarray(patch_moments(images, 3))
    if twin_order:
        filters, moments = filters.transpose(2, 0, 1, 3), moments.reshape(3, 3, 3, 3, 3, 3).transpose(2, 0, 1, 5, 3, 4)
    return filters.reshape(27, 27).T, moments.reshape(27, 27)


def test_whitening_follows_torch(twin):
    import torch

    ours, our_moments = whitening(twin_order=True)
    images = twin.normalized(problem.whitening_images(), torch.float64)
    theirs, moments = twin.whitening_bank(images).reshape(27, 27).numpy(), twin.whitening_moments(images).numpy()
    np.testing.assert_allclose(our_moments, moments, rtol=1e-8, atol=1e-12)
    # Eigenvectors are known up to their sign: compare what the filters do to the twin's moments.
    np.testing.assert_allclose(ours @ moments @ ours.T, theirs @ moments @ theirs.T, rtol=1e-8, atol=1e-12)


def test_whitening_has_golden_variances():
    filters, moments = whitening()
    np.testing.assert_allclose(
        filters @ moments @ filters.T, np.diag(GOLDEN["whitening"]["variances"]), rtol=1e-8, atol=1e-12
    )


def test_every_recipe_has_a_golden_trajectory():
    assert list(GOLDEN["ladder"]["trajectories"]) == list(BY_NAME)
    for case in CASES:
        assert GOLDEN[case]["case"] == CASES[case]._asdict()


@pytest.mark.parametrize("case,name", [(case, name) for case in CASES for name in GOLDEN[case]["trajectories"]])
def test_recipe_follows_golden_trajectory(case, name):
    golden = dict(GOLDEN[case]["trajectories"][name])
    recipe = reduced(BY_NAME[name], CASES[case])
    assert golden.pop("epochs") == recipe.num_epochs
    ours = problem.summary(train_jax(recipe, CASES[case])[0])
    chex.assert_trees_all_close(ours, golden, rtol=1e-8, atol=1e-10)
