import dataclasses
import json
import math
from dataclasses import replace

import pytest
from hypothesis import strategies as st

import fastcifar_jax
from experiments import airbench, bag_of_tricks, convergence, quickstart, transfer
from fastcifar_jax import recipe as recipe_module
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
from tests.helpers_fuzz import ASSIGNMENTS, COUNTS, EXTREMES, SENTINEL, changed, fuzz, set_value
from tests.helpers_fuzz import RECIPES as FUZZED

MODULES = (airbench, bag_of_tricks, convergence, transfer, quickstart)
RECIPES = {recipe.name: recipe for module in MODULES for recipe in module.RECIPES}
FINAL, BASELINE = bag_of_tricks.final, bag_of_tricks.baseline


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
    set_value(values, name, value)
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
        ("optim.peak_lr=" + "-" * 100_000 + "1", "100,015 characters; at most 1000"),
        ("optim.peak_lr={[]: 1}", "expected float"),
        ("optim.peak_lr=1e999", "finite numbers"),
        ("optim.peak_lr=0x" + "f" * 300, "finite numbers"),
        ("num_epochs=0x" + "f" * 300, "whole ones below 2\\*\\*31"),
        ("batch_size=4294967296", "whole ones below 2\\*\\*31"),
        ("mean=3.0", "expected tuple"),
        ("std=(None, 1, 2)", "std.0: expected float, got None"),
        ("model.channels=(1.5, 2, 3, 4)", "model.channels.0: expected int, got 1.5"),
        ("model.res_layers=([],)", "model.res_layers.0: expected str"),
        ("optim.schedule.warmup=(0.1,)", "expected float"),
    ],
)
def test_override_refuses(assignment, message):
    with pytest.raises(ValueError, match=message):
        override(FINAL, assignment)


def numbers(value):
    """All numbers in the value of a recipe's field."""
    if isinstance(value, tuple):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, int | float):
        yield value


@pytest.mark.parametrize("count", COUNTS)
def test_any_change_gives_a_recipe_or_a_value_error(tmp_path, monkeypatch, count):
    """An assignment; several with numbers of epochs and channels; one value anywhere in a recipe's dict."""
    monkeypatch.chdir(tmp_path)
    counts = st.none() | st.integers() | st.sampled_from((10**400, *EXTREMES))

    def body(data):
        recipe, assignments = (
            data.draw(st.sampled_from(FUZZED)),
            data.draw(st.lists(ASSIGNMENTS, min_size=1, max_size=3)),
        )
        values = changed(to_dict(recipe), data.draw)
        arguments = (data.draw(counts), data.draw(counts), "float32")
        for action in (
            lambda: override(recipe, assignments[0]),
            lambda: change(recipe, assignments, *arguments),
            lambda: from_dict(values),
        ):
            try:
                found = action()
            except ValueError as error:
                assert 0 < len(str(error)) < 1000
            else:
                assert len(found.hash) == 16 and found == action() and from_dict(to_dict(found)) == found
                assert all(math.isfinite(x) for value in flatten(found).values() for x in numbers(value))

    fuzz(count, st.data(), body)
    assert not (tmp_path / SENTINEL).exists()


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
    monkeypatch.setattr(recipe_module.backend, "default_dtype", lambda: ("mixed", "it is fast"))
    automatic = Recipe(compute_dtype="auto")
    assert (
        resolve_dtype(automatic).hash
        == Recipe(compute_dtype="mixed").hash
        == change(automatic, (), None, None, None).hash
    )
    assert resolve_dtype(Recipe(compute_dtype="float32")).compute_dtype == "float32"
