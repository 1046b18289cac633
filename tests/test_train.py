from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.airbench import airbench94
from experiments.bag_of_tricks import baseline, final
from fastcifar_jax import train as train_module
from fastcifar_jax.functions import eval_variables, make_functions
from fastcifar_jax.hparams import hparams
from fastcifar_jax.muon import Muon
from fastcifar_jax.ops import backend
from fastcifar_jax.optim import AirbenchSGD
from fastcifar_jax.train import Diverged, compile_run, make_train, train_epochs
from tests.helpers_train import BATCH, DATASET, NUM_TRAIN, linear, make_dataset, numbers, small

KEY = jax.random.key(0)
SGD, MUON = AirbenchSGD(whiten_bias_epochs=1), Muon(whiten_bias_epochs=1, compute_dtype=None)


@pytest.fixture(scope="module")
def final_run():
    """`final`, its program, and its snapshots with key 0, their states on the host."""
    recipe = small(final)
    compiled = compile_run(recipe, 4, DATASET)
    found = train_epochs(recipe, 4, KEY, DATASET, compiled=compiled)
    return recipe, compiled, [snapshot._replace(state=jax.device_get(snapshot.state)) for snapshot in found]


def test_same_key_same_numbers_bit_for_bit(final_run):
    recipe, compiled, snapshots = final_run
    *_, again = train_epochs(recipe, 4, KEY, DATASET, compiled=compiled)
    *_, other = train_epochs(recipe, 4, jax.random.key(1), DATASET, compiled=compiled)
    assert numbers(again) == numbers(snapshots[-1]) != numbers(other)
    chex.assert_trees_all_equal(again.state, snapshots[-1].state)


@pytest.mark.slow
def test_a_new_compilation_gives_the_same_numbers(final_run):
    recipe, _, snapshots = final_run
    jax.clear_caches()
    assert numbers(make_train(recipe, 4)(KEY, DATASET)) == numbers(snapshots[-1])


def test_there_is_a_snapshot_per_epoch_and_a_run_continues_from_it(final_run):
    recipe, compiled, snapshots = final_run
    assert [len(snapshot.epochs) for snapshot in snapshots] == [1, 2, 3]
    assert [int(snapshot.state.step) for snapshot in snapshots] == [3, 6, 9]
    resume = snapshots[0]._replace(state=jax.device_put(snapshots[0].state))
    *_, last = train_epochs(recipe, 4, KEY, DATASET, compiled=compiled, resume=resume)
    assert (
        last.epochs == (snapshots[0].epochs[0], *last.epochs[1:]) and last.setup_seconds == snapshots[0].setup_seconds
    )
    assert numbers(last) == numbers(snapshots[-1])
    chex.assert_trees_all_equal(last.state, snapshots[-1].state)


@pytest.mark.parametrize("loop", ["step", "block", "epoch"])
def test_loops_agree(monkeypatch, loop):
    """One step per call, any number of steps, or an epoch with a known trip count; at 1.5 epochs of three steps."""
    monkeypatch.setattr(backend, "step_loop", lambda: loop)
    recipe, seen = linear(1.5), []
    *_, last = train_epochs(recipe, 4, KEY, DATASET, on_steps=lambda *step: seen.append(step))
    assert int(last.state.step) == 5 and [row.epoch for row in last.epochs] == [1, 2]
    functions = make_functions(recipe, 4, NUM_TRAIN)
    key_init, key_data = jax.random.split(KEY)
    state, step = functions.init(key_init, DATASET), jax.jit(functions.train_steps, static_argnums=6)
    totals = []
    for epoch, num_steps in ((1, 3), (2, 2)):
        plan, sums = functions.plan(key_data, jnp.int32(epoch), DATASET), train_module.zero_totals(recipe)
        for i in range(num_steps):
            state, sums = step(hparams(recipe), state, sums, DATASET, plan, i, 1)
        totals.append(sums)
    chex.assert_trees_all_close(last.state.params, state.params, rtol=1e-5)
    for row, sums, num_steps in zip(last.epochs, totals, (3, 2), strict=True):
        assert row.train_loss == pytest.approx(float(sums.loss) / (num_steps * BATCH), rel=1e-5)
        assert row.train_accuracy == int(sums.correct) / (num_steps * BATCH)
    assert seen[-1] == (2, 2)
    if loop != "block":  # whose first block is one step and whose second is as many as fit into a second
        assert seen == {"epoch": [(1, 3), (2, 2)], "step": [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2)]}[loop]


def test_blocks_of_steps_change_no_number(final_run, monkeypatch):
    recipe, compiled, snapshots = final_run
    if compiled.loop != "block":
        pytest.skip(f"one call runs one {compiled.loop} of steps here, not a block")
    monkeypatch.setattr(train_module, "BLOCK_SECONDS", 0.0)
    seen = []
    *_, last = train_epochs(recipe, 4, KEY, DATASET, compiled=compiled, on_steps=lambda *step: seen.append(step))
    assert seen == [(epoch, step) for epoch in (1, 2, 3) for step in (1, 2, 3)]
    assert numbers(last) == numbers(snapshots[-1])


@pytest.mark.parametrize("recipe", [final, airbench94], ids=lambda recipe: recipe.name)
def test_nothing_in_an_epoch_makes_an_accelerator_wait(recipe):
    """Its trip count is known, and no loop or branch is inside: the host would have to read their predicates."""
    recipe = linear(3, recipe=recipe)
    functions = make_functions(recipe, 4, NUM_TRAIN)
    state, plan = functions.init(KEY, DATASET), functions.plan(KEY, jnp.int32(1), DATASET)
    args = (hparams(recipe), state, train_module.zero_totals(recipe), DATASET, plan, np.int32(0))
    text = jax.jit(lambda *args: functions.train_steps(*args, 3)).lower(*args).compile().as_text()
    assert '"known_trip_count":{"n":"3"}' in text
    assert text.count(" while(") == 1 and text.count(" conditional(") == 0


def test_test_time_augmentation_comes_last_or_after_every_epoch(final_run):
    _, _, snapshots = final_run
    recipe = linear(num_epochs=2)
    last = make_train(recipe, 4)(KEY, DATASET).epochs
    compiled = compile_run(recipe, 4, DATASET, tta_every_epoch=True)
    *_, every = train_epochs(recipe, 4, KEY, DATASET, compiled=compiled)
    assert [row.tta_accuracy is None for row in last] == [True, False]
    assert [row.tta_loss is None for row in snapshots[-1].epochs] == [True, True, False]
    assert None not in sum(every.epochs, ())
    for a, b in zip(numbers(every), [row._replace(train_seconds=0.0) for row in last], strict=True):
        assert a == b._replace(tta_loss=b.tta_loss or a.tta_loss, tta_accuracy=b.tta_accuracy or a.tta_accuracy)


def test_an_accelerator_warms_up_before_the_clock_starts(monkeypatch):
    """An epoch that is thrown away, on the data of the run; it changes no number."""
    recipe, taken = linear(num_epochs=2), []
    expected = numbers(make_train(recipe, 4)(KEY, DATASET))
    monkeypatch.setattr(backend, "step_loop", lambda: "epoch")
    monkeypatch.setattr(train_module, "_warm_up", lambda *args, f=train_module._warm_up: taken.append(f(*args)))
    data = jax.device_put(DATASET)
    found = make_train(recipe, 4)
    assert numbers(found(KEY, data)) == numbers(found(KEY, data)) == expected
    compile_run(recipe, 4, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), DATASET))
    assert len(taken) == 1


def test_constants_never_change(final_run):
    _, compiled, snapshots = final_run
    start = compiled.init(jax.random.split(KEY)[0], DATASET)
    chex.assert_trees_all_equal(snapshots[-1].state.constants, start.constants)
    assert set(start.constants["prep"]["norm"]) == {"scale"}
    filters = (3, 3, 3, 27)
    assert filters in {leaf.shape for leaf in jax.tree.leaves(start.constants)}
    assert filters not in {jnp.shape(leaf) for leaf in jax.tree.leaves((start.opt_state, start.params))}


@pytest.mark.parametrize(
    "recipe",
    [
        linear(2, recipe=replace(airbench94, optim=AirbenchSGD(whiten_bias_epochs=1))),
        pytest.param(small(airbench94, 2, optim=AirbenchSGD(whiten_bias_epochs=1)), marks=pytest.mark.slow),
        pytest.param(
            small(airbench94, 2, optim=Muon(whiten_bias_epochs=1, compute_dtype=None)), marks=pytest.mark.slow
        ),
    ],
    ids=["linear", "sgd", "muon"],
)
def test_gradients_that_are_not_computed_change_nothing(recipe):
    """The whitening layer's bias stays after the first epoch, whether or not its gradient is computed."""
    found = make_train(recipe, 4)(KEY, DATASET).state
    functions, (key_init, key_data) = make_functions(recipe, 4, NUM_TRAIN), jax.random.split(KEY)
    state = jax.jit(functions.init)(key_init, DATASET)
    train_steps = jax.jit(functions.train_steps)
    for epoch in (1, 2):
        plan = functions.plan(key_data, jnp.int32(epoch), DATASET)
        totals = train_module.zero_totals(recipe)
        state, _ = train_steps(hparams(recipe), state, totals, DATASET, plan, jnp.int32(0), jnp.int32(3))
        state = functions.finalize_batch_stats(state, epoch)
    chex.assert_trees_all_close(found.params, state.params, rtol=1e-3, atol=1e-4)
    chex.assert_trees_all_close(eval_variables(found), eval_variables(state), rtol=1e-3, atol=1e-4)


def test_evaluation_uses_the_average(final_run):
    _, _, snapshots = final_run
    variables = eval_variables(snapshots[-1].state)
    chex.assert_trees_all_equal(variables["params"], snapshots[-1].state.average["params"])
    assert not np.array_equal(variables["params"]["linear"], snapshots[-1].state.params["linear"])


@pytest.mark.parametrize(
    "recipe",
    [linear(20), pytest.param(small(baseline, 20, augmentations=()), marks=pytest.mark.slow)],
    ids=["linear", "baseline"],
)
def test_it_learns(recipe):
    """100 steps tell the quadrants apart; chance is 0.25."""
    result = make_train(recipe, num_classes=4)(KEY, make_dataset(160, 40))
    assert result.epochs[-1].test_accuracy > 0.9
    assert result.epochs[-1].train_loss < result.epochs[0].train_loss
    assert result.images_per_second == pytest.approx(100 * BATCH / sum(row.train_seconds for row in result.epochs))


def test_make_train_compiles_once_per_shape():
    train = make_train(linear(), 4)
    first, again, fewer = (train(KEY, data) for data in (DATASET, DATASET, make_dataset(100)))
    assert again.compile_seconds == 0 < min(first.compile_seconds, fewer.compile_seconds)
    assert numbers(again) == numbers(first)


def test_steps_donate_their_state(final_run):
    """The memory of the old state is used for the new one."""
    recipe, compiled, _ = final_run
    state = compiled.init(KEY, DATASET)
    plan = compiled.plan(KEY, np.int32(1), DATASET)
    compiled.train_steps(1, hparams(recipe), DATASET, plan, (state, train_module.zero_totals(recipe)), 0, 3)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.opt_state, state.average)))


def test_diverged_names_recipe_and_epoch():
    recipe = linear()
    recipe = replace(recipe, name="wild", optim=replace(recipe.optim, peak_lr=1e38))
    seen = []
    with pytest.raises(Diverged, match=r"wild diverged in epoch 1: .*lower optim.peak_lr") as caught:
        seen.extend(train_epochs(recipe, 4, KEY, DATASET))
    assert seen == [] and len(caught.value.epochs) == 1
    row = caught.value.epochs[0]
    assert not (np.isfinite(row.train_loss) and np.isfinite(row.test_loss))


@pytest.mark.slow  # by default test_saved_model.py trains in "mixed"
@pytest.mark.parametrize("compute_dtype", ["mixed", "bfloat16", "float16"])
def test_half_precision_keeps_float32_weights_and_stays_near(compute_dtype, final_run):
    _, _, exact = final_run
    result = make_train(small(final, num_epochs=3, compute_dtype=compute_dtype), num_classes=4)(KEY, DATASET)
    assert {leaf.dtype for leaf in jax.tree.leaves(result.state.params)} == {jnp.dtype("float32")}
    assert result.epochs[0].train_loss == pytest.approx(exact[0].epochs[0].train_loss, rel=0.02)


def test_data_smaller_than_a_batch():
    with pytest.raises(ValueError, match="batch_size 32 is larger than the 20 training images"):
        make_train(small(final), num_classes=4)(KEY, make_dataset(20))
