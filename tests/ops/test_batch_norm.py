import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastcifar_jax.ops.batch_norm import normalize_groups, normalize_groups_and_pool
from fastcifar_jax.ops.max_pool import max_pool

EPS = 1e-5


def plain(x, scale, bias, eps, num_groups):
    """The definition, group by group, for JAX to differentiate."""
    y = jnp.zeros_like(x)
    for g in range(num_groups):
        group = x[g::num_groups]
        mean, var = group.mean((0, 1, 2), keepdims=True), group.var((0, 1, 2), keepdims=True)
        normal = (group - mean) / jnp.sqrt(var + eps)
        y = y.at[g::num_groups].set(normal * scale[None, None, None] + bias[None, None, None])
    return y


@pytest.mark.parametrize("num_groups", [1, 2, 4])
def test_value_and_gradients_match_the_definition(num_groups):
    rng = np.random.default_rng(0)
    x, cotangent = (jnp.asarray(rng.normal(size=(8, 3, 5, 6)) * 2 + 1, jnp.float32) for _ in range(2))
    scale, bias = (jnp.asarray(rng.normal(size=6) + 1, jnp.float32) for _ in range(2))
    eps = jnp.float32(EPS)
    norm = lambda x, scale, bias, eps: normalize_groups(x, scale, bias, num_groups, eps)[0]
    found, vjp = jax.vjp(norm, x, scale, bias, eps)
    expected, expected_vjp = jax.vjp(lambda *a: plain(*a, num_groups), x, scale, bias, eps)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(vjp(cotangent), expected_vjp(cotangent), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_statistics_of_the_groups():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3, 5, 6)), jnp.float32)
    _, mean, variance = normalize_groups(x, jnp.ones(6), jnp.zeros(6), 4, EPS)
    for g in range(4):
        group = np.asarray(x, np.float64)[g::4]
        np.testing.assert_allclose(mean[g], group.mean((0, 1, 2)), atol=1e-6)
        np.testing.assert_allclose(variance[g], group.var((0, 1, 2)), rtol=1e-5)


def test_half_precision_maps_keep_their_dtype_and_float32_statistics():
    x = jnp.ones((4, 2, 2, 3), jnp.bfloat16)
    y, mean, variance = normalize_groups(x, jnp.ones(3), jnp.zeros(3), 2, EPS)
    assert (y.dtype, mean.dtype, variance.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("num_groups", "size"), [(1, (2, 2)), (4, (2, 2)), (2, (3, 1))])
def test_norm_and_pool_in_one_are_norm_and_pool(num_groups, size, dtype):
    """Rounded numbers, so that windows have several maxima; scales of both signs and one of zero."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(np.round(rng.normal(size=(8, 6, 4, 5))), dtype)
    scale, bias = (jnp.asarray(a, jnp.float32) for a in ([1.5, -2.0, 0.0, 1.0, 0.5], rng.normal(size=5)))

    def apart(x, scale, bias):
        y, mean, variance = normalize_groups(x, scale, bias, num_groups, EPS)
        return max_pool(y, size), mean, variance

    together = lambda x, scale, bias: normalize_groups_and_pool(x, scale, bias, num_groups, EPS, size)
    (found, vjp), (expected, expected_vjp) = (jax.vjp(f, x, scale, bias) for f in (together, apart))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    cotangents = (jnp.asarray(rng.normal(size=found[0].shape), dtype), *map(jnp.zeros_like, found[1:]))
    for a, b in zip(vjp(cotangents), expected_vjp(cotangents), strict=True):
        assert a.dtype == b.dtype
        tolerance = 1e-5 if dtype == "float32" else 1e-2
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), rtol=tolerance, atol=tolerance)
