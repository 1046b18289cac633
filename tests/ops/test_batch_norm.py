import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastcifar_jax.ops.batch_norm import normalize, normalize_groups, normalize_groups_and_pool
from fastcifar_jax.ops.max_pool import max_pool

EPS = 1e-5


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def plain(x, scale, bias, num_groups):
    """The definition, group by group, for JAX to differentiate; with the statistics."""
    y, statistics = jnp.zeros_like(x), []
    for g in range(num_groups):
        group = x[g::num_groups]
        mean, variance = group.mean((0, 1, 2)), group.var((0, 1, 2))
        y = y.at[g::num_groups].set(normalize(group, scale, bias, mean, variance, EPS))
        statistics.append((mean, variance))
    return y, *map(jnp.stack, zip(*statistics, strict=True))


def test_evaluation_normalises_by_given_statistics():
    x, (scale, bias, mean) = normal(0, 2, 3, 4, 5), normal(1, 3, 5)
    variance = jnp.arange(1.0, 6.0)
    for c in range(5):
        expected = (x[..., c] - mean[c]) / np.sqrt(variance[c] + 0.5) * scale[c] + bias[c]
        np.testing.assert_allclose(
            normalize(x, scale, bias, mean, variance, 0.5)[..., c], expected, rtol=1e-5, atol=1e-6
        )


def zeros(num_groups, channels):
    return jnp.zeros((num_groups, channels))


def values_and_gradients(f, arguments, cotangent):
    """Of the maps, from `cotangent`; the statistics have no gradient."""

    @jax.jit
    def run(*arguments):
        values, vjp = jax.vjp(f, *arguments)
        return values, vjp((cotangent, *map(jnp.zeros_like, values[1:])))

    return run(*arguments)


@pytest.mark.parametrize("num_groups", [1, 2, 4])
def test_values_statistics_and_gradients_match_the_definition(num_groups):
    arguments, cotangent = (normal(0, 8, 3, 5, 6) * 2 + 1, *(normal(2, 2, 6) + 1)), normal(1, 8, 3, 5, 6)
    shift = normal(3, num_groups, 6)
    norm = lambda *a: normalize_groups(*a, shift, num_groups, EPS)
    found, gradients = values_and_gradients(norm, arguments, cotangent)
    expected, expected_gradients = values_and_gradients(lambda *a: plain(*a, num_groups), arguments, cotangent)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 if a.ndim == 4 else 1e-6)
    for a, b in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_groups", [1, 4])
def test_nothing_cancels_where_means_are_100_deviations(num_groups):
    """Against float64, with shifts that are a deviation off, as running means are."""
    x = np.random.default_rng(0).normal(size=(32, 8, 8, 5)) * np.arange(1, 6) + 100 * np.arange(1, 6)
    x = x.astype(np.float32)
    groups = x.astype(np.float64).reshape(-1, num_groups, 8, 8, 5)
    mean, variance = groups.mean((0, 2, 3)), groups.var((0, 2, 3))
    shift = jnp.asarray(mean + np.arange(1, 6), jnp.float32)
    ones = jnp.ones(5)
    y, found_mean, found_variance = jax.jit(lambda x: normalize_groups(x, ones, ones, shift, num_groups, EPS))(x)
    np.testing.assert_allclose(found_mean, mean, rtol=1e-6)
    np.testing.assert_allclose(found_variance, variance, rtol=2e-5)
    expected = (groups - mean[:, None, None]) / np.sqrt(variance + EPS)[:, None, None] + 1
    np.testing.assert_allclose(y, expected.reshape(x.shape), atol=2e-4)
    assert not jax.grad(lambda shift: normalize_groups(x, ones, ones, shift, num_groups, EPS)[0][0].sum())(shift).any()


def test_half_precision_maps_keep_their_dtype_and_float32_statistics():
    x = jnp.ones((4, 2, 2, 3), jnp.bfloat16)
    y, mean, variance = normalize_groups(x, jnp.ones(3), jnp.zeros(3), zeros(2, 3), 2, EPS)
    assert (y.dtype, mean.dtype, variance.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    assert normalize(x, jnp.ones(3), jnp.zeros(3), mean[0], variance[0], EPS).dtype == jnp.bfloat16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("num_groups", "size"), [(1, (2, 2)), (4, (2, 2)), (2, (3, 1))])
def test_norm_and_pool_in_one_are_norm_and_pool(num_groups, size, dtype):
    """Rounded numbers, so that windows have several maxima; scales of both signs and one of zero."""
    x, scale, bias = jnp.round(normal(0, 8, 6, 4, 5)).astype(dtype), jnp.array([1.5, -2, 0, 1, 0.5]), normal(1, 5)

    def apart(x, scale, bias):
        y, mean, variance = normalize_groups(x, scale, bias, zeros(num_groups, 5), num_groups, EPS)
        return max_pool(y, size), mean, variance

    together = lambda *a: normalize_groups_and_pool(*a, zeros(num_groups, 5), num_groups, EPS, size)
    cotangent = normal(2, 8, 6 // size[0], 4 // size[1], 5).astype(dtype)
    found, expected = (values_and_gradients(f, (x, scale, bias), cotangent) for f in (together, apart))
    for a, b in zip(found[0], expected[0], strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    for a, b in zip(found[1], expected[1], strict=True):
        assert a.dtype == b.dtype
        tolerance = 1e-5 if dtype == "float32" else 1e-2
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), rtol=tolerance, atol=tolerance)
