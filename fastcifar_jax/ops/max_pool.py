"""Max-pooling whose windows do not overlap, with a gradient that XLA:CPU can vectorise."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from fastcifar_jax.types import Images


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def max_pool(x: Images, size: tuple[int, int]) -> Images:
    """The maximum of each window; rows and columns that fill no window are dropped.

    The gradient goes to the first maximum in row-major order, as in PyTorch. The gradient of `lax.reduce_window` does
    the same but takes about ten times as long on CPUs; that of `jnp.max` would be shared among equal maxima.

    Args:
      x: NHWC.
      size: height and width of the windows, which are also the strides.
    """
    return functools.reduce(jnp.maximum, _corners(x, size))


def max_pool_with_argmax(
    x: Images, size: tuple[int, int]
) -> tuple[Images, UInt8[Array, "batch height width channels"]]:
    """The maxima, and the place of the first one in each window, counted in row-major order."""
    y = max_pool(x, size)
    first = jnp.full(y.shape, len(_corners(x, size)) - 1, jnp.uint8)
    for i, corner in reversed(list(enumerate(_corners(x, size)[:-1]))):
        first = jnp.where(corner == y, jnp.uint8(i), first)
    return y, first


def scatter_to_argmax(
    first: UInt8[Array, "batch height width channels"], cotangent: Images, size: tuple[int, int]
) -> Float[Array, "batch rows height columns width channels"]:
    """The gradient of the windows, [batch, rows, height, columns, width, channels]: the cotangent, and zeros.

    Args:
      first: of `max_pool_with_argmax`.
      cotangent: of the maxima.
      size: height and width of the windows.
    """
    corner = jnp.arange(size[0] * size[1], dtype=jnp.uint8).reshape(1, 1, size[0], 1, size[1], 1)
    hit = first[:, :, None, :, None] == corner
    return jnp.where(hit, cotangent[:, :, None, :, None], jnp.zeros((), cotangent.dtype))


def _pool_and_residuals(x, size):
    y, first = max_pool_with_argmax(x, size)
    return y, (first, jnp.zeros((0, *x.shape[1:3])))  # an empty array that carries the map's size


def _gradient(size, residuals, cotangent):
    first, map_of_x = residuals
    (height, width), (batch, rows, columns, channels) = size, cotangent.shape
    spread = scatter_to_argmax(first, cotangent, size).reshape(batch, rows * height, columns * width, channels)
    missing = (map_of_x.shape[1] - spread.shape[1], map_of_x.shape[2] - spread.shape[2])
    if any(missing):
        spread = jnp.pad(spread, ((0, 0), (0, missing[0]), (0, missing[1]), (0, 0)))
    return (spread,)


max_pool.defvjp(_pool_and_residuals, _gradient)


def _corners(x, size):
    """The elements of the windows: `height * width` arrays, in row-major order."""
    (height, width), (batch, rows, columns, channels) = size, x.shape
    x = x[:, : rows // height * height, : columns // width * width]
    windows = x.reshape(batch, rows // height, height, columns // width, width, channels)
    return [windows[:, :, i, :, j] for i in range(height) for j in range(width)]
