import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastcifar_jax.ops.max_pool import max_pool


def numpy_pool(x, size):
    """Window by window."""
    (height, width), (n, rows, columns, channels) = size, x.shape
    y = np.empty((n, rows // height, columns // width, channels), x.dtype)
    for i, j in np.ndindex(y.shape[1:3]):
        y[:, i, j] = x[:, i * height : (i + 1) * height, j * width : (j + 1) * width].max((1, 2))
    return y


CASES = [
    ((3, 4, 6, 5), (2, 2)),
    ((2, 7, 5, 3), (2, 2)),
    ((2, 4, 4, 3), (4, 4)),
    ((2, 9, 6, 1), (3, 3)),
    ((1, 4, 6, 2), (2, 3)),
]


@pytest.mark.parametrize(("shape", "size"), CASES)
def test_value_and_gradient_of_distinct_numbers(shape, size):
    x = np.random.default_rng(0).permutation(np.prod(shape)).reshape(shape).astype(np.float32)
    y, vjp = jax.vjp(lambda x: max_pool(x, size), jnp.asarray(x))
    np.testing.assert_array_equal(y, numpy_pool(x, size))
    np.testing.assert_array_equal(y, nn.max_pool(jnp.asarray(x), size, strides=size))
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=y.shape), jnp.float32)
    [gradient] = vjp(cotangent)
    [expected] = jax.vjp(lambda x: nn.max_pool(x, size, strides=size), jnp.asarray(x))[1](cotangent)
    np.testing.assert_array_equal(gradient, expected)


def test_equal_maxima_give_the_gradient_to_the_first():
    x = jnp.array([[0.0, 2.0, 2.0, 2.0], [2.0, 2.0, 2.0, 2.0]])[None, :, :, None]
    gradient = jax.grad(lambda x: max_pool(x, (2, 2)).sum())(x)
    assert gradient[0, :, :, 0].tolist() == [[0, 1, 1, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_keeps_the_dtype(dtype):
    x = jnp.ones((1, 4, 4, 2), dtype)
    assert max_pool(x, (2, 2)).dtype == dtype
    assert jax.grad(lambda x: max_pool(x, (2, 2)).astype(jnp.float32).sum())(x).dtype == dtype


def test_vmap(key):
    x = jax.random.normal(key, (3, 2, 4, 4, 2))
    grad = jax.grad(lambda x: jnp.square(max_pool(x, (2, 2))).sum())
    np.testing.assert_array_equal(jax.vmap(grad)(x), jnp.stack([grad(one) for one in x]))
