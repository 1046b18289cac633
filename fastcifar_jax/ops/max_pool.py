"""Max-pooling over windows that do not overlap, with a gradient that XLA:CPU can vectorise."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt8

from fastcifar_jax.types import Images


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def max_pool(x: Images, size: tuple[int, int]) -> Images:
    """The maximum of each window; rows and columns that do not fill a window are dropped.

    The gradient goes to the first maximum in row-major order, as in PyTorch. That of `lax.reduce_window` does too, but
    takes about ten times as long on CPUs; that of `jnp.max` is shared among equal maxima.

    Args:
      x: NHWC.
      size: height and width of the windows, which are also the strides.
    """
    return functools.reduce(jnp.maximum, _elements(x, size))


def max_pool_with_argmax(
    x: Images, size: tuple[int, int]
) -> tuple[Images, UInt8[Array, "batch height width channels"]]:
    """The maxima, and the index of the first one within each window, in row-major order."""
    y = max_pool(x, size)
    *others, last = enumerate(_elements(x, size))
    argmax = jnp.full(y.shape, last[0], jnp.uint8)
    for i, element in reversed(others):
        argmax = jnp.where(element == y, jnp.uint8(i), argmax)
    # XLA would compute the index again in the gradient, from maps four times as large as the result.
    return lax.optimization_barrier((y, argmax))


def scatter_to_argmax(
    argmax: UInt8[Array, "batch rows columns channels"], cotangent: Images, size: tuple[int, int]
) -> Float[Array, "batch rows height columns width channels"]:
    """The gradient with respect to the windows: the cotangent at the maxima, zeros elsewhere.

    Args:
      argmax: from `max_pool_with_argmax`.
      cotangent: of the maxima.
      size: height and width of the windows.
    """
    index = jnp.arange(size[0] * size[1], dtype=jnp.uint8).reshape(1, 1, size[0], 1, size[1], 1)
    is_maximum = argmax[:, :, None, :, None] == index
    return jnp.where(is_maximum, cotangent[:, :, None, :, None], jnp.zeros((), cotangent.dtype))


def _pool_and_residuals(x, size):
    y, argmax = max_pool_with_argmax(x, size)
    return y, (argmax, jnp.zeros((0, *x.shape[1:3])))  # an empty array that carries the maps' size


def _gradient(size, residuals, cotangent):
    argmax, empty = residuals
    (height, width), (batch, rows, columns, channels) = size, cotangent.shape
    gradient = scatter_to_argmax(argmax, cotangent, size).reshape(batch, rows * height, columns * width, channels)
    missing = (empty.shape[1] - gradient.shape[1], empty.shape[2] - gradient.shape[2])
    if any(missing):
        gradient = jnp.pad(gradient, ((0, 0), (0, missing[0]), (0, missing[1]), (0, 0)))
    return (gradient,)


max_pool.defvjp(_pool_and_residuals, _gradient)


def _elements(x, size):
    """The windows' elements in row-major order: `height * width` arrays of one element per window."""
    (height, width), (batch, rows, columns, channels) = size, x.shape
    x = x[:, : rows // height * height, : columns // width * width]
    windows = x.reshape(batch, rows // height, height, columns // width, width, channels)
    return [windows[:, :, i, :, j] for i in range(height) for j in range(width)]
