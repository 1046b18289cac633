"""The recipes of experiments/: the published table, and what every one of them satisfies."""

from dataclasses import replace

import jax
import pytest

from experiments import airbench, bag_of_tricks, convergence, quickstart, transfer
from fastcifar_jax.functions import check_trainable
from fastcifar_jax.recipe import difference, flatten
from fastcifar_jax.types import Dataset

MODULES = (airbench, bag_of_tricks, convergence, transfer, quickstart)
RECIPES = {recipe.name: recipe for module in MODULES for recipe in module.RECIPES}

# Section 4's table: epochs, knots in epochs, peak, cutout, smoothing, alpha, ghost groups, 1/output scale, bias scale,
# published accuracy, time.
TABLE = {
    "baseline": (24, (0, 5, 24), 0.4, 8, 0, None, 1, 8, 1, 0.941, 75),
    "gpu_preprocessing": (24, (0, 5, 24), 0.4, 8, 0, None, 1, 8, 1, None, 70),
    "pool_before_activation": (24, (0, 5, 24), 0.4, 8, 0, None, 1, 8, 1, None, None),
    "pool_before_norm": (24, (0, 5, 24), 0.4, 8, 0, None, 1, 8, 1, 0.940, None),
    "max_pool": (25, (0, 5, 25), 0.4, 8, 0, None, 1, 8, 1, 0.941, 64),
    "label_smoothing_25": (25, (0, 5, 25), 0.4, 8, 0.2, None, 1, 8, 1, 0.942, None),
    "label_smoothing": (23, (0, 4.6, 23), 0.4, 8, 0.2, None, 1, 8, 1, 0.941, 59),
    "celu_23": (23, (0, 4.6, 23), 0.4, 8, 0.2, 0.075, 1, 8, 1, 0.943, None),
    "celu": (20, (0, 4, 20), 0.4, 8, 0.2, 0.075, 1, 8, 1, 0.941, 52),
    "ghost_norm_20": (20, (0, 4, 20), 0.4, 8, 0.2, 0.075, 16, 8, 1, 0.942, None),
    "ghost_norm": (18, (0, 3.6, 18), 0.6, 8, 0.2, 0.075, 16, 8, 1, 0.941, 46),
    "frozen_scales_16": (18, (0, 3.6, 18), 0.6, 8, 0.2, 0.3, 16, 16, 16, 0.942, None),
    "frozen_scales_64": (18, (0, 3.6, 18), 0.6, 8, 0.2, 0.3, 16, 16, 64, None, None),
    "frozen_scales": (17, (0, 3.4, 17), 0.6, 8, 0.2, 0.3, 16, 16, 64, 0.941, 43),
    "whitening_17": (17, (0, 3.4, 17), 0.6, 8, 0.2, 0.3, 16, 16, 64, 0.944, None),
    "whitening_15": (15, (0, 3, 15), 0.6, 8, 0.2, 0.3, 16, 16, 64, 0.941, 39),
    "whitening": (14, (0, 2.8, 14), 1.0, 5, 0.2, 0.3, 16, 16, 64, 0.941, 36),
    "ema_14": (14, (0, 2.8, 12), 1.0, 5, 0.2, 0.3, 16, 16, 64, 0.943, None),
    "ema": (13, (0, 2.6, 11), 1.0, 5, 0.2, 0.3, 16, 16, 64, 0.941, 34),
    "tta_13": (13, (0, 2.6, 11), 1.0, 5, 0.2, 0.3, 16, 16, 64, 0.946, None),
    "final": (10, (0, 2, 8), 1.0, None, 0.2, 0.3, 16, 16, 64, 0.941, 26),
}  # fmt: skip


def row(recipe):
    parts = flatten(recipe)
    return (
        recipe.num_epochs,
        pytest.approx(recipe.optim.schedule.knots(recipe.num_epochs)),
        recipe.optim.peak_lr,
        parts.get("augmentations.2.size"),
        recipe.loss.label_smoothing,
        parts.get("model.activation.alpha"),
        recipe.model.norm.num_groups,
        1 / recipe.model.output_scale,
        recipe.optim.bias_scale,
        recipe.published.accuracy,
        recipe.published.seconds,
    )


@pytest.mark.parametrize("name", TABLE)
def test_ladder_is_the_table(name):
    recipe = RECIPES[name]
    assert TABLE[name] == row(recipe)
    assert (recipe.batch_size, recipe.optim.momentum, recipe.optim.weight_decay) == (512, 0.9, 5e-4)
    names = list(TABLE)
    later = lambda first: names.index(name) >= names.index(first)
    assert recipe.model.whiten == later("whitening_17")
    assert recipe.model.norm.train_scale != later("frozen_scales_16")
    assert (recipe.average is not None) == later("ema_14")
    assert (type(recipe.sampling).__name__ == "GroupedSampling") == later("gpu_preprocessing")
    order = "conv_pool_norm_act" if later("pool_before_norm") else "conv_norm_act_pool"
    assert recipe.model.pool_order == ("conv_norm_pool_act" if name == "pool_before_activation" else order)


def test_ladder_is_complete_and_in_order():
    assert [recipe.name for recipe in bag_of_tricks.RECIPES] == list(TABLE)


def test_hashes_are_distinct_but_for_equal_recipes():
    """TTA changes nothing in training, and every recipe is evaluated with and without: `tta_13` is `ema`."""
    hashes = {}
    for name, recipe in RECIPES.items():
        hashes.setdefault(recipe.hash, []).append(name)
    assert [names for names in hashes.values() if len(names) > 1] == [["ema", "tta_13"]]


def test_transfer_arms_differ_from_their_parents_as_declared():
    for name, expected in transfer.PARENTS.items():
        assert difference(RECIPES[name], expected)


ARMS = [recipe.name for recipe in (*airbench.RECIPES, *transfer.RECIPES)]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ("airbench96", ARMS[-1]) else pytest.mark.slow) for name in ARMS]
)
def test_an_arm_can_be_trained(name):
    images = lambda n: jax.ShapeDtypeStruct((n, 32, 32, 3), "uint8")
    labels = lambda n: jax.ShapeDtypeStruct((n,), "int32")
    dataset = Dataset(images(4096), labels(4096), images(500), labels(500))
    check_trainable(replace(RECIPES[name], compute_dtype="float32"), 10, dataset)
