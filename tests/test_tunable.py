from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bag_of_tricks import baseline, final
from fastcifar_jax.recipe import override
from fastcifar_jax.train import compile_programs, make_functions, make_train
from fastcifar_jax.tunable import program_key, tunable, with_tunable
from tests.test_train import DATASET, NUM_TRAIN, numbers, small

NAMES = (
    "model.activation.alpha", "model.norm.momentum", "model.norm.eps", "model.whiten_eps", "model.output_scale",
    "loss.label_smoothing", "optim.peak_lr", "optim.momentum", "optim.weight_decay", "optim.bias_scale",
    "optim.schedule.warmup", "optim.schedule.end", "optim.schedule.flat_epochs", "average.decay",
)  # fmt: skip
RECIPE = small(final)
RECIPE = replace(RECIPE, model=replace(RECIPE.model, res_layers=()))  # compiles in half the time


def changed(recipe, name):
    """The recipe with one number a little different."""
    value = tunable(recipe)[name]
    return override(recipe, f"{name}={value - 0.01 if value > 0.5 else value + 0.01!r}")


@pytest.fixture(scope="module")
def programs():
    """CompiledRun that all tests of this file share, with the run of `RECIPE` in them."""
    compiled = {}
    result = make_train(RECIPE, 4, "scan", compiled)(jax.random.key(0), DATASET)
    return compiled, result


def test_names_and_values():
    values = tunable(final)
    assert tuple(values) == NAMES
    assert (values["optim.peak_lr"], values["optim.bias_scale"], values["average.decay"]) == (1.0, 64.0, 0.99)
    assert not {"average.decay", "model.activation.alpha"} & tunable(baseline).keys()


def test_own_values_make_the_same_recipe():
    assert with_tunable(final, tunable(final)) == final
    assert with_tunable(final, {"optim.schedule.end": 0.5}).optim.schedule.end == 0.5 != final.optim.schedule.end


@pytest.mark.parametrize("name", NAMES)
def test_a_sweep_compiles_once_and_gives_the_numbers_of_a_run_alone(programs, name):
    compiled, first = programs
    recipe = changed(RECIPE, name)
    swept = make_train(recipe, 4, "scan", compiled)(jax.random.key(0), DATASET)
    assert swept.compile_seconds == 0 and len(compiled) == 1
    assert numbers(swept) != numbers(first), f"{name} is not used"
    if name == "optim.peak_lr":  # one will do: compiling takes seconds
        alone = make_train(recipe, 4, "scan")(jax.random.key(0), DATASET)
        assert numbers(swept) == numbers(alone)


def test_traced_numbers_are_those_compiled_in(programs):
    recipe, compiled = changed(RECIPE, "optim.peak_lr"), programs[0]
    functions = make_functions(recipe, 4, NUM_TRAIN)
    key = jax.random.key(0)
    plan = functions.plan(key, jnp.int32(1), DATASET)
    expected, _ = jax.jit(functions.train_epoch)(functions.init(key, DATASET), DATASET, plan, jnp.int32(3))
    [shared] = compiled.values()
    found, _ = shared.train_epoch(tunable(recipe), functions.init(key, DATASET), DATASET, plan, 1, 3, None)
    chex.assert_trees_all_close(found.params, expected.params, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(found.average, expected.average, rtol=1e-4, atol=1e-5)


def test_what_is_not_a_tunable_number_is_another_program():
    keys = {program_key(recipe) for recipe in (RECIPE, replace(RECIPE, name="other"), changed(RECIPE, NAMES[0]))}
    assert len(keys) == 1
    for other in (replace(RECIPE, num_epochs=4), replace(RECIPE, average=None), override(RECIPE, "average.every=4")):
        assert program_key(other) not in keys


def test_numbers_stay_in_the_dtype_of_the_weights():
    """Weakly typed, as Python's numbers are; in 64-bit mode a strong one would make everything float64."""
    with jax.enable_x64(True):
        programs = compile_programs(RECIPE, 4, DATASET, "scan")
        state = programs.init(tunable(RECIPE), jax.random.key(0), DATASET)
        plan = programs.plan(jax.random.key(1), np.int32(1), DATASET)
        state, _ = programs.train_epoch(tunable(RECIPE), state, DATASET, plan, 1, 3, None)
        chex.assert_trees_all_equal_dtypes(state.params, jax.tree.map(lambda x: x.astype(jnp.float32), state.params))
