"""The pure functions of a run, without compiling a whole one."""

from dataclasses import dataclass, replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.airbench import airbench94
from experiments.bag_of_tricks import final
from fastcifar_jax.augment import Crop, Cutout, Flip, normalize
from fastcifar_jax.functions import check_trainable, eval_variables, make_functions, zero_totals
from fastcifar_jax.hparams import hparams
from fastcifar_jax.losses import CrossEntropy
from fastcifar_jax.models.layers import BatchNormConfig
from fastcifar_jax.muon import Muon
from fastcifar_jax.ops import backend
from fastcifar_jax.optim import AirbenchSGD, skipped_gradients
from fastcifar_jax.types import Batch, StepInfo
from tests.helpers_train import BATCH, DATASET, NUM_TRAIN, linear, numpy_apply, small


def test_a_batch_is_the_plans_images_with_the_plans_choices():
    """The step in the middle of an epoch, against NumPy: whose augmentation, whose label, in which order."""
    recipe = replace(linear(), augmentations=(Crop(2), Flip(), Cutout(5)))
    functions = make_functions(recipe, 4, NUM_TRAIN)
    state = functions.init(jax.random.key(0), DATASET)
    plan = functions.plan(jax.random.key(1), jnp.int32(1), DATASET)
    step = jax.jit(functions.train_steps, static_argnums=6)
    _, totals = step(hparams(recipe), state, zero_totals(recipe), DATASET, plan, jnp.int32(1), 1)

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


def test_plans_differ_from_epoch_to_epoch():
    plan = make_functions(small(final), 4, NUM_TRAIN).plan
    first, second = (plan(jax.random.key(0), jnp.int32(epoch), DATASET) for epoch in (1, 2))
    assert not np.array_equal(first.order, second.order)


PATTERN = skipped_gradients(airbench94.optim, 4)


def test_epochs_whose_gradients_are_skipped():
    assert [skipped_gradients(airbench94.optim, epoch) for epoch in (1, 3, 4)] == [None, None, PATTERN]
    assert skipped_gradients(AirbenchSGD(whiten_bias_epochs=None), 100) is skipped_gradients(final.optim, 100) is None
    assert skipped_gradients(Muon(whiten_bias_epochs=0), 1) == PATTERN


@pytest.mark.slow
def test_skipped_gradients_are_not_computed():
    work = []
    for skip in (None, PATTERN):
        functions = make_functions(small(airbench94), 4, NUM_TRAIN, skip_gradients=skip)
        state = jax.eval_shape(functions.init, jax.random.key(0), DATASET)
        batch = Batch(jax.ShapeDtypeStruct((BATCH, 16, 16, 3), jnp.float32), jax.ShapeDtypeStruct((BATCH,), jnp.int32))
        work.append(jax.jit(functions.train_step).lower(state, batch).compile().cost_analysis()["flops"])
    assert work[1] < 0.98 * work[0]


def test_finalized_once_under_an_average_and_each_epoch_without():
    norm = BatchNormConfig(num_groups=4, eval_first_group=True)
    model = replace(small(final).model, norm=norm)
    for recipe, merged in ((small(final), (True, False)), (small(final, average=None), (True, True))):
        functions = make_functions(replace(recipe, model=model), 4, NUM_TRAIN)
        shapes = jax.eval_shape(functions.init, jax.random.key(0), DATASET)
        state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        vary = lambda stats: jax.tree.map(lambda s: s + jnp.arange(4.0)[:, None], stats)
        state = state._replace(batch_stats=vary(state.batch_stats))
        if recipe.average is not None:
            state = state._replace(average={**state.average, "batch_stats": vary(state.average["batch_stats"])})
        for epoch, expected in enumerate(merged, start=1):
            mean = eval_variables(functions.finalize_batch_stats(state, epoch))["batch_stats"]["prep"]["norm"]["mean"]
            assert bool(jnp.all(mean == mean[:1])) == expected


def test_state_is_arrays_only():
    state = jax.eval_shape(make_functions(small(final), 4, NUM_TRAIN).init, jax.random.key(0), DATASET)
    assert all(hasattr(leaf, "dtype") for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize(
    ("conv_backend", "runs"),
    [
        ("lax", False),
        pytest.param("lax", True, marks=pytest.mark.slow),
        pytest.param("onednn", True, marks=pytest.mark.slow),
    ],
)
def test_final_step_exports_for_cpu_and_cuda_and_runs_here(conv_backend, runs, monkeypatch):
    """One program for both platforms; the call into jaxlib's oneDNN has to be let through by name."""
    if conv_backend == "onednn" and not backend.check_onednn()[0]:
        pytest.skip(f"oneDNN is not used here: {backend.check_onednn()[1]}")
    monkeypatch.setenv("FASTCIFAR_CONV", conv_backend)
    recipe = small(final)
    functions = make_functions(recipe, 4, NUM_TRAIN)
    make = lambda f, *args: f(*args) if runs else jax.eval_shape(f, *args)
    state = make(functions.init, jax.random.key(0), DATASET)
    plan = make(functions.plan, jax.random.key(0), jnp.int32(1), DATASET)
    arguments = (hparams(recipe), state, zero_totals(recipe), DATASET, plan, jnp.int32(0))
    one_step = jax.jit(lambda *args: functions.train_steps(*args, 1))
    allowed = [jax.export.DisabledSafetyCheck.custom_call("__onednn$convolution")] * (conv_backend == "onednn")
    exported = jax.export.export(one_step, platforms=("cpu", "cuda"), disabled_checks=allowed)(*arguments)
    assert set(exported.platforms) == {"cpu", "cuda"}
    assert ("__onednn$convolution" in exported.mlir_module()) == (conv_backend == "onednn")
    if runs:
        chex.assert_trees_all_close(exported.call(*arguments)[1], one_step(*arguments)[1], rtol=1e-5)


def test_a_fork_can_drive_the_step_itself(key):
    """`train_step` is a pure function of a state and a batch: same arguments, same answer."""
    functions = make_functions(linear(), 4, NUM_TRAIN)
    state = functions.init(key, DATASET)
    batch = Batch(jax.random.normal(key, (BATCH, 16, 16, 3)), jnp.arange(BATCH) % 4)
    step = jax.jit(chex.assert_max_traces(functions.train_step, 1))
    chex.assert_trees_all_equal(step(state, batch), step(state, batch))
    assert isinstance(step(state, batch)[1], StepInfo)


@dataclass(frozen=True)
class Branching(CrossEntropy):
    """A loss that Python branches in, on a number that is traced."""

    gamma: float = 0.5

    def __call__(self, logits, labels):
        return super().__call__(logits, labels) * (2 if self.gamma > 0 else 1)


def test_a_number_that_python_branches_on_is_refused_with_advice():
    with pytest.raises(ValueError, match=r"loss.gamma.*mark its field with metadata=\{\"static\": True\}"):
        check_trainable(replace(linear(), loss=Branching()), 4, DATASET)
