"""Every recipe against its implementation in PyTorch: PyTorch itself where it is installed, golden numbers everywhere.

Trajectories are compared in float64, where a difference is a mistake and not rounding.
"""

import json
import pathlib
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.airbench import airbench94, airbench94_muon
from experiments.bag_of_tricks import RECIPES
from fastcifar_jax.augment import normalize
from fastcifar_jax.averaging import Lookahead
from fastcifar_jax.models.activations import Gelu
from fastcifar_jax.models.whitening import patch_moments, whitening_filters
from fastcifar_jax.muon import Muon
from fastcifar_jax.optim import Nesterov
from tests.reference import problem
from tests.reference.problem import AIRBENCH, EPOCHS, LADDER, Case
from tests.reference.trajectories import reduced, train_jax, trajectory

BY_NAME = {recipe.name: recipe for recipe in (*RECIPES, airbench94, airbench94_muon)}
CASES = {"ladder": LADDER, "epochs": EPOCHS, "airbench": AIRBENCH}
GOLDEN = {
    name: json.loads((pathlib.Path(__file__).parent / f"golden/{name}.json").read_text())
    for name in (*CASES, "whitening")
}
TRAJECTORIES = [(case, name) for case in CASES for name in GOLDEN[case]["trajectories"]]
# Each compiles a step of its own; the default run has the steps at the ends of the ladder and airbench.
SLOW = {"pool_before_activation", "celu_23", "frozen_scales_16", "whitening_17"}
GOLDEN_CASES = [
    pytest.param(*pair, marks=[pytest.mark.slow] * (pair[0] == "epochs" or pair[1] in SLOW)) for pair in TRAJECTORIES
]
ATOL = {LADDER: 1e-12, EPOCHS: 1e-12, AIRBENCH: 1e-11}


def model_with(recipe, **changes):
    return replace(recipe, model=replace(recipe.model, **changes))


def first_group(recipe):
    return model_with(recipe, norm=replace(recipe.model.norm, eval_first_group=True))


VARIANTS = {
    "statistics merged after each epoch": first_group(BY_NAME["ghost_norm"]),
    "average merged after the first epoch": first_group(BY_NAME["final"]),
    "other layers, optimiser and average": replace(
        model_with(
            BY_NAME["frozen_scales"],
            extra_layers=("layer1", "layer2", "layer3"),
            res_layers=("layer2",),
            activation=Gelu(),
        ),
        optim=Muon(),
        average=Lookahead(),
    ),
    "three convolutions": model_with(airbench94, convs=3),
    "nesterov": replace(airbench94, optim=Nesterov(bias_scale=64.0)),
}


@pytest.fixture(scope="module")
def twin(torch_on_one_thread):
    """The PyTorch side."""
    from tests import helpers_torch

    return helpers_torch


def assert_follows_torch(twin, recipe, case, from_jax_init=False):
    """Float64 agreement to 1e-8 of every number in two trajectories."""
    ours = trajectory(recipe, case, from_jax_init)
    theirs = twin.train_torch(recipe, case, train_jax(recipe, case, from_jax_init).before[0])
    chex.assert_trees_all_equal_dtypes(ours.weights, theirs.weights)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-8, atol=ATOL.get(case, 1e-12))


@pytest.mark.parametrize(("case", "name"), [pair for pair in TRAJECTORIES if pair[0] != "epochs"])
def test_recipe_follows_torch(twin, case, name):
    assert_follows_torch(twin, reduced(BY_NAME[name], CASES[case]), CASES[case])


@pytest.mark.parametrize("name", ["baseline", "final"])
def test_three_epochs_follow_torch(twin, name):
    # From the package's own initialisation, whitening filters included. 20 steps and one more: the last step of a
    # schedule that ends at zero has rate 0 and moves by momentum alone.
    assert_follows_torch(twin, reduced(BY_NAME[name], EPOCHS), EPOCHS, from_jax_init=True)


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_follows_torch(twin, name):
    recipe = VARIANTS[name]
    case = AIRBENCH if recipe.model.__class__.__name__ == "AirNet" else Case(6, steps_per_epoch=2, num_epochs=3)
    assert_follows_torch(twin, reduced(recipe, case), case)


@pytest.mark.parametrize("name", ["baseline", "final"])
def test_float32_losses_follow_torch(twin, name):
    # Each step from the package's weights. Left to themselves float32 trajectories part within a few steps, PyTorch's
    # from PyTorch's own float64 too (1e-2 at step 6): rounding turns a maximum or a ReLU over, and gradients jump.
    recipe = reduced(BY_NAME[name], EPOCHS, "float32")
    ours = train_jax(recipe, EPOCHS)
    np.testing.assert_allclose(ours.losses, twin.losses_at(recipe, EPOCHS, ours.before), rtol=1e-4)


def whitening():
    """The package's filters and patch moments as matrices, features (row, column, channel)."""
    with jax.enable_x64(True):
        recipe = BY_NAME["final"]
        images = normalize(jnp.asarray(problem.whitening_images()), recipe.mean, recipe.std, jnp.float64)
        filters, moments = np.asarray(whitening_filters(images)), np.asarray(patch_moments(images, 3))
    return filters.reshape(27, 27).T, moments.reshape(27, 27)


def test_whitening_follows_torch(twin):
    channel_first = np.arange(27).reshape(3, 3, 3).transpose(2, 0, 1).ravel()  # as in PyTorch
    ours, our_moments = whitening()
    ours, our_moments = ours[:, channel_first], our_moments[np.ix_(channel_first, channel_first)]
    theirs, moments = twin.filters_and_moments(BY_NAME["final"])
    np.testing.assert_allclose(our_moments, moments, rtol=1e-8, atol=1e-12)
    # Eigenvectors are known up to their sign: compare what the filters do to the moments.
    np.testing.assert_allclose(ours @ moments @ ours.T, theirs @ moments @ theirs.T, rtol=1e-8, atol=1e-12)


def test_whitening_has_golden_variances():
    filters, moments = whitening()
    np.testing.assert_allclose(
        filters @ moments @ filters.T, np.diag(GOLDEN["whitening"]["variances"]), rtol=1e-8, atol=1e-12
    )


def test_every_recipe_has_a_golden_trajectory():
    assert [name for _, name in TRAJECTORIES] == [*(r.name for r in RECIPES), "baseline", "final", *list(BY_NAME)[-2:]]
    for case in CASES:
        assert GOLDEN[case]["case"] == CASES[case]._asdict()


@pytest.mark.parametrize(("case", "name"), GOLDEN_CASES)
def test_recipe_follows_golden_trajectory(case, name):
    golden = dict(GOLDEN[case]["trajectories"][name])
    recipe = reduced(BY_NAME[name], CASES[case])
    assert golden.pop("epochs", recipe.num_epochs) == recipe.num_epochs
    ours = problem.summary(trajectory(recipe, CASES[case]))
    chex.assert_trees_all_close(ours, golden, rtol=1e-8, atol=1e-10)
