import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastcifar_jax.norm import normalize_groups

EPS = 1e-5


def plain(x, scale, bias, num_groups):
    """The definition, group by group, for JAX to differentiate."""
    y = jnp.zeros_like(x)
    for g in range(num_groups):
        group = x[g::num_groups]
        mean, var = group.mean((0, 1, 2), keepdims=True), group.var((0, 1, 2), keepdims=True)
        normal = (group - mean) / jnp.sqrt(var + EPS)
        y = y.at[g::num_groups].set(normal * scale[None, None, None] + bias[None, None, None])
    return y


@pytest.mark.parametrize("num_groups", [1, 2, 4])
def test_value_and_gradients_match_the_definition(num_groups):
    rng = np.random.default_rng(0)
    x, cotangent = (jnp.asarray(rng.normal(size=(8, 3, 5, 6)) * 2 + 1, jnp.float32) for _ in range(2))
    scale, bias = (jnp.asarray(rng.normal(size=6) + 1, jnp.float32) for _ in range(2))
    found, vjp = jax.vjp(lambda *a: normalize_groups(*a, num_groups, EPS)[0], x, scale, bias)
    expected, expected_vjp = jax.vjp(lambda *a: plain(*a, num_groups), x, scale, bias)
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
