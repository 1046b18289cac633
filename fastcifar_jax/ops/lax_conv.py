"""The convolution and its weight gradient by `lax`, for every platform."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, DTypeLike, Float

from fastcifar_jax.types import Images

Kernel = Float[Array, "height width inputs outputs"]
Padding = tuple[tuple[int, int], tuple[int, int]]  # zeros (above, below) and (left, right)


def conv(x: Images, kernel: Kernel, padding: Padding, out_dtype: DTypeLike | None = None) -> Images:
    """The output, in `out_dtype`; in the operands' dtype when None."""
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, (1, 1), padding, dimension_numbers=layout, preferred_element_type=out_dtype
    )


def weight_gradient(x: Images, cotangent: Images, padding: Padding) -> Kernel:
    """The gradient with respect to the kernel, in float32: sums over images as if they were input features."""
    layout = ("CHWN", "IHWO", "HWNC")
    return lax.conv_general_dilated(
        x, cotangent, (1, 1), padding, dimension_numbers=layout, preferred_element_type=jnp.float32
    )
