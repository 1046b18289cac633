import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastcifar_jax.ops.max_pool import max_pool

CASES = [
    ((3, 4, 6, 5), (2, 2)),
    ((2, 7, 5, 3), (2, 2)),
    ((2, 4, 4, 3), (4, 4)),
    ((2, 9, 6, 1), (3, 3)),
    ((1, 4, 6, 2), (2, 3)),
]


@pytest.mark.parametrize(("shape", "size"), CASES)
def test_value_and_gradient_of_distinct_numbers(shape, size):
    x = jnp.asarray(np.random.default_rng(0).permutation(np.prod(shape)).reshape(shape), jnp.float32)
    (y, vjp), (expected, expected_vjp) = (
        jax.vjp(f, x) for f in (lambda x: max_pool(x, size), lambda x: nn.max_pool(x, size, strides=size))
    )
    np.testing.assert_array_equal(y, expected)
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=y.shape), jnp.float32)
    np.testing.assert_array_equal(vjp(cotangent)[0], expected_vjp(cotangent)[0])


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
    grad = jax.jit(jax.grad(lambda x: jnp.square(max_pool(x, (2, 2))).sum()))
    np.testing.assert_array_equal(jax.vmap(grad)(x), jnp.stack([grad(one) for one in x]))
