"""AirNet and its optimisers against their definitions; `tests/reference` compares whole trajectories."""

from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import transfer
from experiments.airbench import RECIPES, airbench96
from fastcifar_jax.models.airnet import AirNet, unit_std
from fastcifar_jax.models.layers import dirac
from fastcifar_jax.muon import Muon, orthogonalize
from fastcifar_jax.optim import AirbenchSGD
from fastcifar_jax.schedules import Triangle


@pytest.fixture
def key():
    """XLA takes seconds to compile the default generator's bits for every new shape, and little for these."""
    return jax.random.key(0, impl="rbg")


def test_published_shapes():
    """Section 2's table: 1,971,640 numbers with the norms' biases, 118.1 million multiply-adds.

    A tenth of these are for the last rows and columns of odd maps, which the pools drop; they are not computed.
    """
    model = AirNet()(10)
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)), images)
    assert sum(x.size for x in jax.tree.leaves(variables["params"])) == 1_971_640 - 288
    assert variables["constants"]["whiten"]["kernel"].shape == (2, 2, 3, 24)
    macs = sum(np.ravel(leaf)[0] for leaf in jax.tree.leaves(model.macs(variables, images)))
    sides = {31: 24 * 64, 15: 64 * 256, 7: 256 * 256}  # of the maps that are pooled: inputs times outputs
    dropped = sum((side**2 - (side - 1) ** 2) * 9 * channels for side, channels in sides.items())
    assert macs + dropped == pytest.approx(118.1e6, rel=1e-3)
    assert macs == pytest.approx(105.4e6, rel=1e-3)


@pytest.mark.parametrize(("inputs", "outputs"), [(4, 4), (3, 8), (6, 4)])
def test_dirac_passes_channels_on(key, inputs, outputs):
    kernel = dirac(key, (3, 3, inputs, outputs), jnp.float32)
    x = jax.random.normal(key, (2, 5, 5, inputs))
    y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    same = min(inputs, outputs)
    np.testing.assert_allclose(y[..., :same], x[..., :same], atol=1e-6)
    assert np.abs(kernel[..., same:]).max(initial=0) <= 1 / np.sqrt(9 * inputs)


def test_initial_head_and_whitening_bias(key):
    assert float(unit_std(key, (256, 10), jnp.float32).std(ddof=1)) == pytest.approx(1, rel=1e-5)
    images = jax.random.normal(key, (4, 16, 16, 3))
    bias = lambda **start: AirNet(channels=(4, 4, 4), **start)(10).init(key, images)["params"]["whiten"]["bias"]
    biases = {start: jax.jit(lambda start=start: bias(whiten_bias=start))() for start in ("zeros", "uniform")}
    assert np.all(biases["zeros"] == 0) and 0.2 < np.abs(biases["uniform"]).max() <= 12**-0.5


@pytest.mark.parametrize("shape", [(8, 30), (30, 8), (6, 6)])
def test_newton_schulz_keeps_singular_vectors(shape):
    """Against a float64 SVD: what the iteration does to each singular value, and nothing to the vectors."""
    with jax.enable_x64(True):
        matrix = np.random.default_rng(0).normal(size=shape)
        found = np.asarray(orthogonalize(jnp.asarray(matrix), steps=3, dtype=None))
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
        s = s / (np.linalg.norm(matrix) + 1e-7)
        for _ in range(3):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        np.testing.assert_allclose(found, (u * s) @ vt, atol=1e-12)
    # The large ones are near 1 after three steps, and five bring the small ones there too.
    assert s.max() < 1.3
    five = np.linalg.svd(
        np.asarray(orthogonalize(jnp.asarray(matrix, jnp.float32), steps=5, dtype=None)), compute_uv=False
    )
    assert 0.3 < five.min() and five.max() < 1.3


def test_newton_schulz_in_bfloat16_is_the_same_roughly(key):
    matrix = jax.random.normal(key, (16, 144))
    exact, rounded = orthogonalize(matrix, dtype=None), orthogonalize(matrix)
    assert rounded.dtype == jnp.float32
    assert float(jnp.abs(exact - rounded).max()) < 0.02


def test_airbench_sgd_numbers():
    """Section 5: rates and L2 coefficients for a summed loss at batch 1024; the first step has a fifth of the rate."""
    params = {"conv": {"kernel": jnp.float32(1)}, "norm": {"bias": jnp.float32(1)}, "whiten": {"bias": jnp.float32(1)}}
    tx = AirbenchSGD(momentum=0.85)(9.9, 48, 1024)

    def update(gradient):
        grads = jax.tree.map(lambda _: jnp.float32(gradient / 1024), params)
        return tx.update(grads, tx.init(params), params)[0]

    decayed = update(0.0)
    fraction = -0.2 * 1.85 * 1.99565e-3
    chex.assert_trees_all_close(decayed, jax.tree.map(lambda _: fraction, params), rtol=1e-5)
    rates = jax.tree.map(lambda a, b: (b - a) / (0.2 * 1.85), update(1.0), decayed)
    expected = {"conv": {"kernel": 1.46484e-3}, "norm": {"bias": 0.09375}, "whiten": {"bias": 1.46484e-3}}
    chex.assert_trees_all_close(rates, expected, rtol=1e-4)


@pytest.mark.parametrize(
    "optim", [AirbenchSGD(whiten_bias_epochs=1), Muon(whiten_bias_epochs=1), Muon(whiten_bias_epochs=0)]
)
def test_the_whitening_bias_is_frozen(optim):
    params = {
        "whiten": {"bias": jnp.ones(2)},
        "g": {"conv": {"kernel": jnp.ones((3, 3, 2, 2))}},
        "linear": jnp.ones((2, 2)),
    }
    tx = optim(2, 2, 4)
    state, moved = tx.init(params), []
    for _ in range(4):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        moved.append(bool(jnp.any(updates["whiten"]["bias"] != 0)))
    assert moved == [True, True, False, False] if optim.whiten_bias_epochs else not any(moved)


@pytest.mark.parametrize("recipe", [r for r in transfer.RECIPES if r.name.endswith("_with_muon")], ids=lambda r: r.name)
def test_transfer_muon_trains_the_head_as_airbench_does(recipe):
    """Logits over another number than 256, from a head that is as much smaller, take the same way."""
    x, start = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(8, 5), (5, 3)]))

    def logits_after_steps(optim, scale):
        params = {"linear": start / (256 * scale)}
        tx = replace(optim, schedule=Triangle())(2, 2, 8)
        logits, state = lambda params: scale * (x @ params["linear"]), tx.init(params)
        for _ in range(4):
            grads = jax.grad(lambda params: jnp.sin(40 * logits(params)).sum() / 8)(params)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return logits(params)

    found, expected = logits_after_steps(recipe.optim, recipe.model.output_scale), logits_after_steps(Muon(), 1 / 256)
    chex.assert_trees_all_close(found, expected, rtol=1e-4)
    assert jnp.abs(expected - x @ start / 256).max() > 0.01


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AirNet(channels=(1, 2)), "three numbers"),
        (lambda: AirNet(convs=4), "convs is 4"),
        (lambda: AirNet(head="zero"), "head is 'zero'; choose one of uniform, unit_std"),
        (lambda: AirNet(whiten_bias="ones"), "choose one of zeros, uniform"),
        (lambda: AirbenchSGD(lr=0.0), "lr 0.0"),
        (lambda: Muon(momentum=1.0), r"momenta \(1.0, 0.85\)"),
        (lambda: Muon(newton_schulz_steps=0), "newton_schulz_steps 0"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_recipes_say_what_they_reached():
    assert {recipe.published.device for recipe in RECIPES} == {"A100"}
    assert airbench96.published.petaflop == 4.91 and airbench96.model.convs == 3
