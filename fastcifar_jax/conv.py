"""The one convolution of every model. The only file that may know platforms."""

from jax import lax
from jaxtyping import Array, DTypeLike, Float

from fastcifar_jax.types import Images


def conv(
    x: Images, kernel: Float[Array, "height width inputs outputs"], operand_dtype: DTypeLike | None = None
) -> Images:
    """Cross-correlation with stride 1 and zero padding to the same size.

    Args:
      x: NHWC.
      kernel: HWIO, odd height and width; a master copy in another dtype than `x` is cast.
      operand_dtype: dtype of both operands of the products; `x.dtype` when None. The result has `x.dtype`.
    """
    dtype = x.dtype if operand_dtype is None else operand_dtype
    y = lax.conv_general_dilated(
        x.astype(dtype), kernel.astype(dtype), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return y.astype(x.dtype)
