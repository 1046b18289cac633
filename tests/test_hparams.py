import dataclasses
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import pytest

from experiments.airbench import airbench94, airbench94_muon
from experiments.bag_of_tricks import final
from fastcifar_jax.hparams import hparams, program_key, with_hparams
from fastcifar_jax.losses import CrossEntropy
from fastcifar_jax.recipe import override
from fastcifar_jax.train import compile_run, train_epochs
from tests.helpers_train import DATASET, linear, numbers

KEY = jax.random.key(0)
RECIPE = linear()
NAMES = (
    "loss.label_smoothing", "optim.peak_lr", "optim.momentum", "optim.weight_decay", "optim.bias_scale",
    "optim.schedule.warmup", "optim.schedule.end", "optim.schedule.flat_epochs",
)  # fmt: skip


def changed(recipe, name):
    """The recipe with one number a little different."""
    value = hparams(recipe)[name]
    return override(recipe, f"{name}={value - 0.01 if value > 0.5 else value + 0.01!r}")


@pytest.fixture(scope="module")
def first():
    """The program of `RECIPE` and its last snapshot."""
    compiled = compile_run(RECIPE, 4, DATASET)
    *_, last = train_epochs(RECIPE, 4, KEY, DATASET, compiled=compiled)
    return compiled, last


def test_names_and_values():
    values = hparams(final)
    assert tuple(values) == NAMES
    assert (values["optim.peak_lr"], values["optim.bias_scale"]) == (1.0, 64.0)
    assert {"optim.schedule.start", "optim.schedule.end"} <= hparams(airbench94).keys()
    assert "optim.schedule.peak" not in hparams(airbench94)  # a static field
    assert "optim.head_lr" in hparams(airbench94_muon) and "optim.newton_schulz_steps" not in hparams(airbench94_muon)


def test_own_values_make_the_same_recipe():
    assert with_hparams(final, hparams(final)) == final
    assert with_hparams(final, {"optim.schedule.end": 0.5}).optim.schedule.end == 0.5 != final.optim.schedule.end


def test_numbers_of_a_users_part_are_traced_unless_they_are_static():
    @dataclasses.dataclass(frozen=True)
    class Focal(CrossEntropy):
        gamma: float = 0.5
        power: float = dataclasses.field(default=2.0, metadata={"static": True})
        name: str = "focal"

    assert set(hparams(replace(final, loss=Focal()))) == {*NAMES, "loss.gamma"}


@pytest.mark.parametrize("name", NAMES)
def test_one_program_serves_every_value(first, name):
    compiled, last = first
    recipe = changed(RECIPE, name)
    *_, swept = train_epochs(recipe, 4, KEY, DATASET, compiled=compiled)
    assert numbers(swept) != numbers(last), f"{name} is not used"
    assert program_key(recipe) == program_key(RECIPE)
    if name == "optim.peak_lr":  # one will do
        *_, alone = train_epochs(recipe, 4, KEY, DATASET)
        assert numbers(swept) == numbers(alone)


def test_what_is_not_traced_is_another_program():
    keys = {program_key(recipe) for recipe in (final, replace(final, name="other"), changed(final, NAMES[0]))}
    assert len(keys) == 1
    for other in ("num_epochs=14", "average.every=4", "average.decay=0.9", "model.norm.eps=0.1"):
        assert program_key(override(final, other)) not in keys


def test_numbers_stay_in_the_dtype_of_the_weights():
    """Weakly typed, as Python's numbers are; in 64-bit mode a strong one would make everything float64."""
    with jax.enable_x64(True):
        *_, last = train_epochs(replace(RECIPE, num_epochs=1), 4, KEY, DATASET)
        chex.assert_trees_all_equal_dtypes(last.state.params, jax.tree.map(jnp.float32, last.state.params))
