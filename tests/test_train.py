from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.airbench import airbench94
from experiments.bag_of_tricks import baseline, final
from fastcifar_jax.augment import Crop, Cutout, Flip, normalize
from fastcifar_jax.models.layers import BatchNormConfig
from fastcifar_jax.muon import Muon
from fastcifar_jax.ops import backend
from fastcifar_jax.optim import AirbenchSGD, skipped_gradients
from fastcifar_jax.train import (
    Diverged,
    compile_programs,
    eval_variables,
    make_functions,
    make_train,
    shapes_of,
    zero_totals,
)
from fastcifar_jax.tunable import tunable
from fastcifar_jax.types import Batch, Dataset, StepInfo
from tests.test_augment import numpy_apply

NUM_TRAIN, BATCH = 112, 32  # 3 steps an epoch and a remainder of 16


def small(recipe, num_epochs=3, compute_dtype="float32", **changes):
    """A recipe with four channels in prep, batches of 32 in 4 ghost groups and images of 16x16."""
    groups = min(recipe.model.norm.num_groups, 4)
    model = replace(recipe.model, norm=replace(recipe.model.norm, num_groups=groups)).with_width(4)
    changes = {"batch_size": BATCH, "augmentations": (Crop(2), Flip()), **changes}
    return replace(recipe, num_epochs=num_epochs, model=model, compute_dtype=compute_dtype, **changes)


def make_dataset(num_train=NUM_TRAIN, num_test=20):
    """Four classes told apart by the brightness of a quadrant, in noise."""
    rng = np.random.default_rng(0)

    def split(n):
        labels = np.arange(n) % 4
        images = rng.integers(0, 120, (n, 16, 16, 3))
        for image, label in zip(images, labels, strict=True):
            y, x = 8 * (label // 2), 8 * (label % 2)
            image[y : y + 8, x : x + 8] += 120
        return images.astype(np.uint8), labels.astype(np.int32)

    return jax.device_put(Dataset(*split(num_train), *split(num_test)))


DATASET = make_dataset()


def numbers(result):
    """Everything but the times."""
    return [info._replace(train_seconds=0.0) for info in result.epochs]


@pytest.fixture(scope="module")
def final_run():
    """`final` and its run with key 0, compiled once for this file."""
    recipe = small(final)
    train = make_train(recipe, num_classes=4, driver="python")
    return recipe, train, train(jax.random.key(0), DATASET)


def test_same_key_same_numbers_bit_for_bit(final_run):
    _, train, first = final_run
    again, other = train(jax.random.key(0), DATASET), train(jax.random.key(1), DATASET)
    assert numbers(again) == numbers(first)
    chex.assert_trees_all_equal(again.state, first.state)
    assert numbers(other) != numbers(first)
    assert first.compile_seconds > again.compile_seconds


def test_a_new_compilation_gives_the_same_numbers(final_run):
    recipe, _, first = final_run
    jax.clear_caches()
    again = make_train(recipe, num_classes=4, driver="python")(jax.random.key(0), DATASET)
    assert numbers(again) == numbers(first)


def test_scan_and_python_drivers_agree(final_run):
    """The loops differ in fusion only; nine steps keep that at rounding."""
    recipe, _, first = final_run
    scanned = make_train(recipe, num_classes=4, driver="scan")(jax.random.key(0), DATASET)
    chex.assert_trees_all_close(scanned.state.params, first.state.params, rtol=1e-3, atol=1e-4)
    assert int(scanned.state.step) == int(first.state.step) == 9
    for a, b in zip(scanned.epochs, first.epochs, strict=True):
        assert a.train_loss == pytest.approx(b.train_loss, rel=1e-4)
        assert a.train_accuracy == b.train_accuracy
        assert (a.test_loss, a.tta_loss) == pytest.approx((b.test_loss, b.tta_loss), rel=1e-3)


def test_frozen_arrays_never_change(final_run):
    recipe, _, result = final_run
    functions = make_functions(recipe, 4, NUM_TRAIN)
    start = jax.jit(functions.init)(jax.random.split(jax.random.key(0))[0], DATASET)
    chex.assert_trees_all_equal(result.state.constants, start.constants)
    assert set(result.state.constants["prep"]["norm"]) == {"scale"}
    frozen_shapes = {leaf.shape for leaf in jax.tree.leaves(start.constants)}
    assert (3, 3, 3, 27) in frozen_shapes
    assert (3, 3, 3, 27) not in {jnp.shape(leaf) for leaf in jax.tree.leaves((start.opt_state, start.params))}


@pytest.mark.parametrize(
    "optim, driver",
    [(AirbenchSGD(whiten_bias_epochs=1), "python"), (Muon(whiten_bias_epochs=1, compute_dtype=None), "scan")],
)
def test_gradients_that_are_not_computed_change_nothing(optim, driver):
    """The whitening layer's bias stays after the first epoch, whether or not its gradient is computed."""
    recipe = small(airbench94, optim=optim)
    found = make_train(recipe, 4, driver)(jax.random.key(0), DATASET).state

    functions, (key_init, key_data) = make_functions(recipe, 4, NUM_TRAIN), jax.random.split(jax.random.key(0))
    state = jax.jit(functions.init)(key_init, DATASET)
    train_epoch = jax.jit(functions.train_epoch)
    for epoch in (1, 2, 3):
        plan = functions.plan(key_data, jnp.int32(epoch), DATASET)
        state, _ = train_epoch(state, DATASET, plan, jnp.int32(3))
        state = functions.finalize_batch_stats(state, epoch)
    chex.assert_trees_all_close(found.params, state.params, rtol=1e-3, atol=1e-4)
    chex.assert_trees_all_close(eval_variables(found), eval_variables(state), rtol=1e-3, atol=1e-4)


def test_frozen_parameters_of_an_epoch_are_spared_work():
    recipe = small(airbench94)
    pattern = skipped_gradients(recipe.optim, 4)
    assert [skipped_gradients(recipe.optim, epoch) for epoch in (1, 3, 4)] == [None, None, pattern]
    assert skipped_gradients(AirbenchSGD(whiten_bias_epochs=None), 100) is skipped_gradients(final.optim, 100) is None
    assert skipped_gradients(Muon(whiten_bias_epochs=0), 1) == pattern
    work = []
    for frozen in (None, pattern):
        functions = make_functions(recipe, 4, NUM_TRAIN, skip_gradients=frozen)
        shapes = shapes_of(functions, recipe, DATASET)
        args = shapes.state, shapes.totals, DATASET, shapes.plan, shapes.index
        work.append(jax.jit(functions.train_batch).lower(*args).compile().cost_analysis()["flops"])
    assert work[1] < 0.98 * work[0]


def test_evaluation_uses_the_average(final_run):
    _, _, result = final_run
    variables = eval_variables(result.state)
    chex.assert_trees_all_equal(variables["params"], result.state.average["params"])
    assert not np.array_equal(variables["params"]["linear"], result.state.params["linear"])


def test_it_learns():
    """100 steps of the baseline tell the quadrants apart; chance is 0.25."""
    recipe = replace(small(baseline, num_epochs=20), augmentations=())
    result = make_train(recipe, num_classes=4)(jax.random.key(0), make_dataset(160, 40))
    assert result.epochs[-1].test_accuracy > 0.9
    assert result.epochs[-1].train_loss < result.epochs[0].train_loss


def test_a_batch_is_the_plans_images_with_the_plans_choices(final_run):
    """The step in the middle of an epoch, against NumPy: whose augmentation, whose label, in which order."""
    recipe = replace(final_run[0], augmentations=(Crop(2), Flip(), Cutout(5)))
    functions = make_functions(recipe, 4, NUM_TRAIN)
    state = functions.init(jax.random.key(0), DATASET)
    plan = functions.plan(jax.random.key(1), jnp.int32(1), DATASET)
    _, totals = jax.jit(functions.train_batch)(state, zero_totals(recipe), DATASET, plan, jnp.int32(1))

    order, choices = np.asarray(plan.order), [np.asarray(choice) for choice in plan.choices]
    ids = order[BATCH : 2 * BATCH]
    images = np.asarray(normalize(DATASET.train_images[ids], recipe.mean, recipe.std))
    for augmentation, choice in zip(recipe.augmentations, choices, strict=True):
        options = augmentation.options(16, 16)
        images = np.stack([numpy_apply(augmentation, x, options[choice[i]]) for x, i in zip(images, ids, strict=True)])
    batch = Batch(jnp.asarray(images), DATASET.train_labels[ids])
    _, info = jax.jit(functions.train_step)(state, batch)
    chex.assert_trees_all_close(totals, info, rtol=1e-5)
    assert len(set(order.tolist())) == NUM_TRAIN  # so that no image comes twice in an epoch


def test_steps_give_their_state_away(final_run):
    """Donated: the memory of the old state is used for the new one."""
    recipe, _, _ = final_run
    programs = compile_programs(recipe, 4, DATASET, "python")
    state = programs.init(tunable(recipe), jax.random.key(0), DATASET)
    plan = programs.plan(jax.random.key(1), np.int32(1), DATASET)
    programs.train_epoch(tunable(recipe), state, DATASET, plan, 1, 1, None)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.opt_state, state.average)))


def test_plans_differ_from_epoch_to_epoch(final_run):
    recipe, _, _ = final_run
    plan = make_functions(recipe, 4, NUM_TRAIN).plan
    first, second = (plan(jax.random.key(0), jnp.int32(epoch), DATASET) for epoch in (1, 2))
    assert not np.array_equal(first.order, second.order)


@pytest.mark.parametrize("driver", ["python", "scan"])
def test_diverged_names_recipe_and_epoch(driver):
    recipe = small(baseline)
    recipe = replace(recipe, name="wild", optim=replace(recipe.optim, peak_lr=1e20))
    seen = []
    with pytest.raises(Diverged, match=r"wild diverged in epoch 1: .*lower optim.peak_lr") as caught:
        make_train(recipe, num_classes=4, driver=driver)(jax.random.key(0), DATASET, on_epoch=seen.append)
    assert seen == [] and len(caught.value.epochs) == 1
    assert not np.isfinite(caught.value.epochs[0].train_loss)


@pytest.mark.parametrize("compute_dtype", ["mixed", "bfloat16", "float16"])
def test_half_precision_keeps_float32_weights_and_stays_near(compute_dtype, final_run):
    _, _, exact = final_run
    result = make_train(small(final, compute_dtype=compute_dtype), num_classes=4)(jax.random.key(0), DATASET)
    assert {leaf.dtype for leaf in jax.tree.leaves(result.state.params)} == {jnp.dtype("float32")}
    assert result.epochs[0].train_loss == pytest.approx(exact.epochs[0].train_loss, rel=0.02)


def test_callbacks(final_run):
    _, train, first = final_run
    epochs, steps = [], []
    train(jax.random.key(0), DATASET, epochs.append, lambda epoch, step, totals: steps.append((epoch, step)))
    assert [info.epoch for info in epochs] == [1, 2, 3]
    assert steps == [(epoch, step) for epoch in (1, 2, 3) for step in (1, 2, 3)]


def test_data_smaller_than_a_batch():
    with pytest.raises(ValueError, match="batch_size 32 is larger than the 20 training images"):
        make_train(small(final), num_classes=4)(jax.random.key(0), make_dataset(20))


def test_faithful_merges_once_under_an_average_and_each_epoch_without():
    norm = BatchNormConfig(num_groups=4, eval_first_group=True)
    for recipe, merged in ((small(final), (True, False)), (small(final, average=None), (True, True))):
        recipe = replace(recipe, model=replace(recipe.model, norm=norm))
        functions = make_functions(recipe, 4, NUM_TRAIN)
        state = functions.init(jax.random.key(0), DATASET)
        vary = lambda stats: jax.tree.map(lambda s: s + jnp.arange(4.0)[:, None], stats)
        state = state._replace(batch_stats=vary(state.batch_stats))
        if recipe.average is not None:
            state = state._replace(average={**state.average, "batch_stats": vary(state.average["batch_stats"])})
        for epoch, expected in enumerate(merged, start=1):
            mean = eval_variables(functions.finalize_batch_stats(state, epoch))["batch_stats"]["prep"]["norm"]["mean"]
            assert bool(jnp.all(mean == mean[:1])) == expected


def test_state_is_arrays_only(final_run):
    recipe, _, _ = final_run
    state = jax.eval_shape(make_functions(recipe, 4, NUM_TRAIN).init, jax.random.key(0), DATASET)
    assert all(hasattr(leaf, "dtype") for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("way", ["lax", "onednn"])
def test_final_step_exports_for_cpu_and_cuda_and_runs_here(way, monkeypatch):
    """One program for both platforms; the call into jaxlib's oneDNN has to be let through by name."""
    if way == "onednn" and not backend.check_onednn()[0]:
        pytest.skip(f"oneDNN is not used here: {backend.check_onednn()[1]}")
    monkeypatch.setenv("FASTCIFAR_CONV", way)
    recipe = small(final)
    functions = make_functions(recipe, 4, NUM_TRAIN)
    state = functions.init(jax.random.key(0), DATASET)
    plan = functions.plan(jax.random.key(0), jnp.int32(1), DATASET)
    arguments = (state, zero_totals(recipe), DATASET, plan, jnp.int32(0))
    export = jax.export.export(
        jax.jit(functions.train_batch),
        platforms=("cpu", "cuda"),
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call("__onednn$convolution")] if way == "onednn" else [],
    )
    exported = export(*arguments)
    assert set(exported.platforms) == {"cpu", "cuda"}
    assert ("__onednn$convolution" in exported.mlir_module()) == (way == "onednn")
    chex.assert_trees_all_close(exported.call(*arguments)[1], jax.jit(functions.train_batch)(*arguments)[1], rtol=1e-5)


def test_a_fork_can_drive_the_step_itself(key):
    """`train_step` is a pure function of a state and a batch: same arguments, same answer."""
    functions = make_functions(small(final), 4, NUM_TRAIN)
    state = functions.init(key, DATASET)
    batch = Batch(jax.random.normal(key, (BATCH, 16, 16, 3)), jnp.arange(BATCH) % 4)
    step = jax.jit(chex.assert_max_traces(functions.train_step, 1))
    chex.assert_trees_all_equal(step(state, batch), step(state, batch))
    assert isinstance(step(state, batch)[1], StepInfo)


@pytest.mark.parametrize("driver", ["python", "scan"])
def test_the_last_epoch_may_be_a_part_of_one(driver):
    """At three steps an epoch, 1.5 epochs are five steps."""
    recipe = small(airbench94, num_epochs=1.5)
    steps = []
    result = make_train(recipe, 4, driver)(jax.random.key(0), DATASET, on_step=lambda *step: steps.append(step[:2]))
    assert int(result.state.step) == 5 and [info.epoch for info in result.epochs] == [1, 2]
    if driver == "python":
        assert steps == [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2)]
    assert 0 <= result.epochs[1].train_accuracy <= 1 and np.isfinite(result.epochs[1].train_loss)
    assert result.images_per_second == pytest.approx(5 * BATCH / sum(info.train_seconds for info in result.epochs))
