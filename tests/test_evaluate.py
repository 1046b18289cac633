import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastcifar_jax.augment import normalize
from fastcifar_jax.evaluate import FlipTTA, NoTTA, SixViewTTA, evaluate
from fastcifar_jax.losses import CrossEntropy

MEAN, STD = (100.0, 110.0, 120.0), (50.0, 60.0, 70.0)


def linear_predict(images):
    """Logits that a mirror image changes."""
    weights = np.random.default_rng(1).normal(size=(8 * 8 * 3, 5)).astype(np.float32)
    return images.reshape(len(images), -1) @ weights


@pytest.mark.parametrize("num_images", [7, 20, 23])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_matches_numpy_in_any_chunks(num_images, smoothing):
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (num_images, 8, 8, 3)).astype(np.uint8), rng.integers(0, 5, num_images)
    as_images = functools.partial(normalize, mean=MEAN, std=STD)
    evaluation = functools.partial(evaluate, linear_predict, CrossEntropy(smoothing), FlipTTA(), as_images, chunk=10)
    found = jax.jit(evaluation)(pixels, jnp.asarray(labels, jnp.int32))

    images = ((pixels - np.array(MEAN)) / np.array(STD)).astype(np.float32)
    plain, mirrored = np.asarray(linear_predict(images)), np.asarray(linear_predict(images[:, :, ::-1]))

    def loss_and_accuracy(logits):
        log_p = logits - logits.max(1, keepdims=True)
        log_p = log_p - np.log(np.exp(log_p).sum(1, keepdims=True))
        true = log_p[np.arange(num_images), labels]
        return -((1 - smoothing) * true + smoothing * log_p.mean(1)).mean(), (logits.argmax(1) == labels).mean()

    expected = (*loss_and_accuracy(plain), *loss_and_accuracy((plain + mirrored) / 2))
    np.testing.assert_allclose(np.array(found) / num_images, expected, rtol=1e-4)


def test_flip_averages_logits_and_is_blind_to_mirroring():
    images = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8, 8, 3)), jnp.float32)
    once, twice = FlipTTA()(linear_predict, images), FlipTTA()(linear_predict, images[:, :, ::-1])
    chex.assert_trees_all_close(once, twice, rtol=1e-5)
    chex.assert_trees_all_close(once, (linear_predict(images) + linear_predict(images[:, :, ::-1])) / 2, rtol=1e-5)


def test_no_tta():
    images = jnp.ones((2, 8, 8, 3))
    chex.assert_trees_all_equal(NoTTA()(linear_predict, images), linear_predict(images))


def test_six_views(key):
    """Against views cut out by hand; a predictor that gives away which pixels it saw."""
    images = jax.random.normal(key, (3, 6, 5, 2))
    weights = jax.random.normal(jax.random.fold_in(key, 1), (6, 5, 2, 4))
    predict = lambda x: jnp.einsum("nhwc,hwck->nk", x, weights)
    rows = {-1: [1, 0, 1, 2, 3, 4], 0: list(range(6)), 1: [1, 2, 3, 4, 5, 4]}  # reflected, the edge not repeated
    columns = {-1: [1, 0, 1, 2, 3], 0: list(range(5)), 1: [1, 2, 3, 4, 3]}
    expected = 0
    for shift, weight in ((0, 0.25), (-1, 0.125), (1, 0.125)):
        view = images[:, rows[shift]][:, :, columns[shift]]
        expected += weight * (predict(view) + predict(view[:, :, ::-1]))
    np.testing.assert_allclose(SixViewTTA()(predict, images), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="shift 0"):
        SixViewTTA(shift=0)
