"""The recipe from a record, and the verdict on a rerun."""

import dataclasses
import json
import math

import pytest

from experiments import airbench, bag_of_tricks
from fastcifar_jax.losses import CrossEntropy
from fastcifar_jax.recipe import change, to_dict
from fastcifar_jax.runs.files import dumps
from fastcifar_jax.runs.reproduce import BITWISE, DIFFERENT, WITHIN, compare_rerun, recipe_of
from tests.helpers_records import DIVERGED, RECORD, with_changes

FINAL = bag_of_tricks.final


def record_of(recipe, **changes):
    """As it would be read from a file."""
    values = json.loads(dumps(to_dict(recipe, repr)))
    return dataclasses.replace(RECORD, recipe=values, recipe_hash=recipe.hash, **changes)


@pytest.mark.parametrize(
    ("declared", "assignments", "rest"),
    [
        (FINAL, "", (None, None, None)),
        (FINAL, "optim.peak_lr=2 model.norm.eval_first_group=True average=None mean=(9,8.5,7)", (3, 16, "bfloat16")),
        (FINAL, "optim.schedule.flat_epochs=0.5 num_epochs=1 optim.schedule.warmup=0.4", (None, None, "float32")),
        (
            airbench.RECIPES[0],
            "num_epochs=1.5 optim.whiten_bias_epochs=None augmentations.0.padding=1",
            (None, 8, "mixed"),
        ),
    ],
)
def test_the_recipe_of_a_record(declared, assignments, rest):
    recipe = change(declared, assignments.split(), *rest)
    assert recipe_of(record_of(recipe), declared) == recipe


@dataclasses.dataclass(frozen=True)
class Scaled(CrossEntropy):
    dtype: float | type = float


@pytest.mark.parametrize(
    ("recipe", "changes", "fault"),
    [
        (FINAL, {"recipe_hash": "0" * 16}, f"its hash is {FINAL.hash}, on record 0000000000000000"),
        (FINAL, {"recipe": {}}, "recipe: expected a dict whose type is one of Recipe, got {}"),
        (dataclasses.replace(FINAL, loss=Scaled(0.2)), {}, "loss: expected a dict whose type is one of CrossEntropy, "),
    ],
)
def test_a_recipe_that_is_not_here(recipe, changes, fault):
    with pytest.raises(ValueError, match=f"{fault}.*check out the code"):
        recipe_of(dataclasses.replace(record_of(recipe), **changes), FINAL)


def test_parts_of_the_declared_recipe():
    """Its own class is found by name; a value that JSON cannot hold is on record as its repr and is not rebuilt."""
    mine = dataclasses.replace(FINAL, loss=Scaled(0.2, dtype=1.5))
    record = record_of(change(mine, ["loss.label_smoothing=0.1"], None, None, "float32"))
    assert recipe_of(record, mine).loss == Scaled(0.1, 1.5)
    record = record_of(dataclasses.replace(FINAL, loss=Scaled(0.2)))
    assert record.recipe["loss"]["dtype"] == "<class 'float'>"
    with pytest.raises(ValueError, match=r"loss.dtype: expected float \| type, got .*class 'float'"):
        recipe_of(record, mine)


def with_last(record, **changes):
    return dataclasses.replace(record, epochs=(*record.epochs[:-1], record.epochs[-1]._replace(**changes)))


@pytest.mark.parametrize(
    ("rerun", "verdict", "accuracy", "loss", "first"),
    [
        (RECORD, BITWISE, 0, 0, None),
        (with_last(RECORD, train_seconds=99.0), BITWISE, 0, 0, None),
        (with_last(RECORD, test_loss=math.nextafter(0.25, 1)), WITHIN, 0, 2.2e-14, 2),
        (with_last(RECORD, test_accuracy=0.9418), WITHIN, 0.1, 0, 2),
        (with_last(RECORD, test_accuracy=0.9419), DIFFERENT, 0.11, 0, 2),
        (with_last(RECORD, train_loss=0.4996), WITHIN, 0, 0.08, 2),
        (with_last(RECORD, train_loss=0.51), DIFFERENT, 0, 100 * 0.01 / 0.51, 2),
        (with_last(RECORD, tta_loss=math.nan), DIFFERENT, 0, math.inf, 2),
        (dataclasses.replace(RECORD, result={**RECORD.result, "tta_accuracy": 0.5}), DIFFERENT, 44.5, 0, 2),
        (dataclasses.replace(RECORD, epochs=RECORD.epochs[:1]), DIFFERENT, pytest.approx(19.08, abs=99), 0, None),
        (dataclasses.replace(RECORD, status="crashed", result=None), DIFFERENT, 0, 0, None),
    ],
)
def test_verdict(rerun, verdict, accuracy, loss, first):
    answer = compare_rerun(RECORD, rerun, 0.1 + 1e-9)
    assert answer["verdict"] == verdict and answer["first_epoch"] == first
    assert answer["largest"]["accuracy"] == pytest.approx(accuracy)
    assert answer["largest"]["loss"] == pytest.approx(loss, rel=0.02)


def test_losses_that_are_not_finite_are_equal_to_each_other():
    [row] = DIVERGED.epochs
    nan = dataclasses.replace(
        DIVERGED, epochs=(row._replace(train_loss=math.inf, test_loss=math.nan, tta_loss=math.nan),)
    )
    assert compare_rerun(DIVERGED, nan, 0)["verdict"] == BITWISE


def test_what_differs_in_the_making():
    rerun = with_changes(RECORD, conv="onednn", versions={"torch": "2"})
    answer = compare_rerun(RECORD, rerun)
    assert answer["provenance_diff"] == {"conv": ["lax", "onednn"], "versions.torch": [None, "2"]}
    assert compare_rerun(RECORD, RECORD)["provenance_diff"] == {}
