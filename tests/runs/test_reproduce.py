"""The recipe from a record, and the verdict on a rerun."""

import dataclasses
import json
import math

import pytest

from experiments import airbench, bag_of_tricks
from fastcifar_jax.recipe import change, flatten
from fastcifar_jax.runs.files import dumps
from fastcifar_jax.runs.rebuild import rebuild
from fastcifar_jax.runs.reproduce import BITWISE, DIFFERENT, WITHIN, compare_rerun
from tests.helpers_records import DIVERGED, RECORD, with_changes

FINAL = bag_of_tricks.final


def record_of(recipe, **changes):
    """As it would be read from a file."""
    values = json.loads(dumps(flatten(recipe)))
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
    assert rebuild(declared, record_of(recipe)) == recipe


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"optim.peak_lr": 3.0}, r"has the hash \w+, the record's recipe \w+: all values are the same, but the parts"),
        ({"optim.peak_lr": None}, "optim.peak_lr is 1.0, on record None"),
        (
            {"loss": "Focal", "loss.gamma": 0.5},
            "loss is 'CrossEntropy', on record 'Focal', loss.gamma is None, on record 0.5",
        ),
        ({"model.channels": "__import__('os').system('true')"}, "model.channels is"),
    ],
)
def test_another_recipe_is_refused(values, fault):
    record = record_of(FINAL)
    with pytest.raises(ValueError, match=f"{fault}.*check out the code"):
        rebuild(FINAL, dataclasses.replace(record, recipe=record.recipe | values, recipe_hash="0" * 16))


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
