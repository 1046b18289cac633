import dataclasses
import json
from dataclasses import replace

import jax
import pytest

import fastcifar_jax
from experiments import airbench, bag_of_tricks, convergence, quickstart, transfer
from fastcifar_jax import recipe as recipe_module
from fastcifar_jax.functions import check_trainable
from fastcifar_jax.losses import CrossEntropy
from fastcifar_jax.recipe import (
    Published,
    Recipe,
    change,
    difference,
    flatten,
    from_dict,
    override,
    resolve_dtype,
    to_dict,
)
from fastcifar_jax.types import Dataset

MODULES = (airbench, bag_of_tricks, convergence, transfer, quickstart)
RECIPES = {recipe.name: recipe for module in MODULES for recipe in module.RECIPES}
FINAL, BASELINE = bag_of_tricks.final, bag_of_tricks.baseline

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


def test_hash_ignores_name_and_published():
    assert replace(FINAL, name="x", published=Published()).hash == FINAL.hash
    assert replace(FINAL, num_epochs=11).hash != FINAL.hash


def test_repr_is_an_expression_of_public_names():
    names = {name: getattr(fastcifar_jax, name) for name in fastcifar_jax.__all__}
    for recipe in RECIPES.values():
        assert eval(repr(recipe), names) == recipe


def test_dict_and_back():
    for recipe in RECIPES.values():
        values = to_dict(recipe)
        for again in (from_dict(values), from_dict(json.loads(json.dumps(values)))):
            assert again == recipe and repr(again) == repr(recipe)


@dataclasses.dataclass(frozen=True)
class Confident(CrossEntropy):
    penalty: float = 0.1
    shape: tuple = (1, "a")


def test_a_fork_brings_its_own_part():
    mine = replace(FINAL, name="mine", loss=Confident(0.2))
    assert flatten(mine)["loss"] == "Confident" and flatten(mine)["loss.penalty"] == 0.1
    assert mine.hash != FINAL.hash
    assert from_dict(to_dict(mine), own_parts=[Confident]) == mine
    assert override(mine, "loss.shape=[2, None]").loss.shape == (2, None)
    with pytest.raises(ValueError, match="recipe.loss: expected a dict whose type is one of CrossEntropy, Relu, Celu"):
        from_dict(to_dict(mine))


def test_a_part_that_is_not_plain_values():
    with pytest.raises(ValueError, match=r"recipe\.loss\.penalty: expected a number, .* got <class 'float'>"):
        to_dict(replace(FINAL, loss=Confident(penalty=float)))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("optim.peak_lr", "0.4", "recipe.optim.peak_lr: expected float, got '0.4'"),
        ("optim.peak_lr", True, "peak_lr: expected float, got True"),
        ("optim.peak_lr", float("nan"), "peak_lr: got nan; give finite numbers"),
        ("optim.peak_lr", 1e39, "peak_lr: got 1e\\+39; give finite numbers"),
        ("optim.peak_lr", 10**400, "peak_lr: got 1000"),
        ("num_epochs", None, "num_epochs: expected int | float, got None"),
        ("batch_size", 2**31, "batch_size: got 2147483648; .* whole ones below 2\\*\\*31"),
        ("batch_size", 0, "batch_size is 0"),
        ("name", "\x1b[2J", "name: got .* printable"),
        ("name", "x" * 10_001, "name: got .* at most 10,000"),
        ("mean", [1.0] * 10_001, "mean: expected tuple"),
        ("mean", 3.0, "mean: expected tuple"),
        ("std", [], "need one number per channel"),
        ("model.whiten", 1, "recipe.model.whiten: expected bool, got 1"),
        ("model.pool_order", "pool", "expected one of conv_norm_act_pool, conv_norm_pool_act, "),
        ("model.channels", [1, 2, 3], "expected tuple"),
        ("model.width", 3, "expected the fields channels, .* of ResNet9, got "),
        ("model", {"type": "ResNet9"}, "expected the fields channels"),
        ("model", {"type": ["ResNet9"]}, "a dict whose type is one of ResNet9, AirNet, got"),
        ("model", {"type": "Recipe"}, "a dict whose type is one of ResNet9, AirNet, got"),
        ("model", "ResNet9", "a dict whose type is one of ResNet9, AirNet, got 'ResNet9'"),
        ("average", {"type": "Ema", "decay": 2.0, "every": 5}, "decay"),
        ("average", 3, "average: expected .*Average | None, got 3"),
        ("augmentations", [{"type": "Flip"}, None], "recipe.augmentations.1: expected a dict"),
        ("published", None, "recipe.published: expected a dict whose type is one of Published"),
        ("type", "Published", "recipe: expected a dict whose type is one of Recipe"),
    ],
)
def test_from_dict_refuses(name, value, message):
    values = to_dict(FINAL)
    *parents, last = name.split(".")
    part = values
    for parent in parents:
        part = part[parent]
    part[last] = value
    with pytest.raises(ValueError, match=message):
        from_dict(values)


def test_part_that_prints_as_an_address():
    with pytest.raises(ValueError, match=r"part of recipe 'mine' .*frozen dataclass"):
        replace(FINAL, name="mine", loss=lambda logits, labels: logits)


@pytest.mark.parametrize(
    ("assignment", "name", "value"),
    [
        ("optim.peak_lr=0.8", "optim.peak_lr", 0.8),
        ("optim.peak_lr=2", "optim.peak_lr", 2.0),
        ("num_epochs = 12", "num_epochs", 12),
        ("optim.schedule.warmup=0.25", "optim.schedule.warmup", 0.25),
        ("augmentations.0.padding=2", "augmentations.0.padding", 2),
        ("model.norm.eval_first_group=True", "model.norm.eval_first_group", True),
        ("compute_dtype=bfloat16", "compute_dtype", "bfloat16"),
        ("model.channels=(8,16,32,64)", "model.channels", (8, 16, 32, 64)),
        ("model.channels=[8,16,32,64]", "model.channels", (8, 16, 32, 64)),
        ("mean=(125, 122.5, 113)", "mean", (125, 122.5, 113)),
        ("sampling.max_options=None", "sampling.max_options", None),
        ("average=None", "average", None),
    ],
)
def test_override(assignment, name, value):
    changed = override(FINAL, assignment)
    assert flatten(changed)[name] == value and type(flatten(changed)[name]) is type(value)
    assert all(key.startswith(name) for key in difference(changed, FINAL))


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("optim.peek_lr=0.8", "nearest: optim.peak_lr"),
        ("optim.peak_lr", "write name=value"),
        ("optim.peak_lr=fast", "expected float, got 'fast'"),
        ("batch_size=2.5", "expected int, got 2.5"),
        ("batch_size=True", "expected int, got True"),
        ("num_epochs=ten", r"expected int \| float, got 'ten'"),
        ("optim=3", "set one of its fields"),
        ("num_epochs=0", "num_epochs is 0"),
        ("num_epochs=2", "must increase"),
        ("compute_dtype=float8", "choose one of auto, float32"),
        ("model.channels=(1,2)", "expected tuple"),
        ("model.channels=(0,1,2,3)", "four numbers"),
        ("model.norm.num_groups=0", "num_groups 0"),
        ("batch_size=-1", "batch_size is -1"),
        ("augmentations.7.size=3", "nearest"),
        ("name=x", "has no 'name'"),
        ("augmentations.0=1e999", "a part, not a number"),
    ],
)
def test_override_refuses(assignment, message):
    with pytest.raises(ValueError, match=message):
        override(FINAL, assignment)


def test_difference():
    assert difference(bag_of_tricks.label_smoothing_25, bag_of_tricks.max_pool) == {"loss.label_smoothing": (0.2, 0.0)}
    assert difference(bag_of_tricks.ema_14, bag_of_tricks.whitening) == {
        "average": ("Ema", None),
        "average.decay": (0.99, None),
        "average.every": (5, None),
        "optim.schedule.end": (0.1, 0.0),
        "optim.schedule.flat_epochs": (2.0, 0.0),
    }


def test_default_recipe_is_the_baseline_with_the_later_warmup():
    assert difference(Recipe(), BASELINE) == {"optim.schedule.warmup": (1 / 5, 5 / 24)}


def test_auto_stands_for_this_machines_dtype(monkeypatch):
    monkeypatch.setattr(recipe_module.backend, "default_dtype", lambda: "mixed")
    automatic = Recipe(compute_dtype="auto")
    assert (
        resolve_dtype(automatic).hash
        == Recipe(compute_dtype="mixed").hash
        == change(automatic, (), None, None, None).hash
    )
    assert resolve_dtype(Recipe(compute_dtype="float32")).compute_dtype == "float32"


@pytest.mark.parametrize("name", [recipe.name for recipe in (*airbench.RECIPES, *transfer.RECIPES)])
def test_an_arm_can_be_trained_and_differs_from_its_base(name):
    recipe = RECIPES[name]
    shape = lambda *shape, dtype: jax.ShapeDtypeStruct(shape, dtype)
    images = lambda n: shape(n, 32, 32, 3, dtype="uint8")
    labels = lambda n: shape(n, dtype="int32")
    check_trainable(
        replace(recipe, compute_dtype="float32"), 10, Dataset(images(4096), labels(4096), images(500), labels(500))
    )
    if name in transfer.PARENTS:
        assert difference(recipe, transfer.PARENTS[name])
