"""The one convolution of every model: by `lax`, or by oneDNN where `backend.conv_backend` chooses it.

The gradient with respect to the input is a convolution too: of the cotangent with the transposed kernel (turned by 180
degrees, its channel axes exchanged), with the padding that restores the input's size.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import DTypeLike

from fastcifar_jax.ops import lax_conv, onednn
from fastcifar_jax.ops.backend import conv_backend
from fastcifar_jax.ops.lax_conv import Kernel, Padding
from fastcifar_jax.types import Images


def conv(
    x: Images, kernel: Kernel, operand_dtype: DTypeLike | None = None, padding: Literal["SAME", "VALID"] = "SAME"
) -> Images:
    """Cross-correlation with stride 1.

    Args:
      x: NHWC.
      kernel: HWIO, in any dtype.
      operand_dtype: dtype that both operands are cast to; `x.dtype` when None. The result has `x.dtype`.
      padding: "SAME" pads with zeros to the size of `x`; "VALID" does not pad.

    Raises:
      ValueError: the kernel is larger than the maps.
    """
    dtype = jnp.dtype(x.dtype if operand_dtype is None else operand_dtype)
    size = kernel.shape[:2]
    margin = (size[0] // 2, size[1] // 2) if padding == "SAME" else (0, 0)
    if padding == "SAME" and not (size[0] % 2 and size[1] % 2):  # lax pads more at the end for an even kernel
        x = jnp.pad(x, ((0, 0), *(((taps - 1) // 2, taps // 2) for taps in size), (0, 0)))
        margin = (0, 0)
    if any(side + 2 * edge < taps for side, edge, taps in zip(x.shape[1:3], margin, size, strict=True)):
        raise ValueError(f"a kernel of {size[0]}x{size[1]} does not fit into maps of {x.shape[1]}x{x.shape[2]}")
    use_onednn = onednn.supports(x, kernel, dtype) and conv_backend()[0] == "onednn"
    if use_onednn or dtype != x.dtype:
        return _conv(x, kernel, margin, dtype, use_onednn)
    return lax_conv.conv(x, kernel.astype(dtype), margin)


# The three passes are each other's derivatives, so that any number of derivatives can be taken. The casts to the
# operands' dtype lie inside, so that results and gradients have the caller's dtype and were never rounded to theirs.


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _conv(x: Images, kernel: Kernel, padding: Padding, dtype: jnp.dtype, use_onednn: bool) -> Images:
    """The convolution in `x.dtype`, from operands in `dtype`."""
    operands = (x.astype(dtype), kernel.astype(dtype))
    return _on_platform(lax_conv.conv, onednn.conv, use_onednn, *operands, padding=padding, out_dtype=x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _weight_gradient(x: Images, cotangent: Images, padding: Padding, dtype: jnp.dtype, use_onednn: bool) -> Kernel:
    """The gradient with respect to the kernel, in float32, from operands in `dtype`."""
    operands = (x.astype(dtype), cotangent.astype(dtype))
    return _on_platform(lax_conv.weight_gradient, onednn.weight_gradient, use_onednn, *operands, padding=padding)


def _on_platform(by_lax, by_onednn, use_onednn, *operands, **options):
    """oneDNN on CPUs and `lax` elsewhere, decided when a program is lowered: it may be exported for both."""
    by_lax, by_onednn = (functools.partial(f, **options) for f in (by_lax, by_onednn))
    return lax.platform_dependent(*operands, cpu=by_onednn, default=by_lax) if use_onednn else by_lax(*operands)


def _conv_and_residuals(x, kernel, padding, dtype, use_onednn):
    return _conv(x, kernel, padding, dtype, use_onednn), (x.astype(dtype), kernel)


def _gradients_of_conv(padding, dtype, use_onednn, residuals, cotangent):
    x, kernel = residuals
    to_x = _conv(cotangent, _transposed_kernel(kernel), _transposed_padding(kernel, padding), dtype, use_onednn)
    to_kernel = _weight_gradient(x, cotangent, padding, dtype, use_onednn)
    return to_x, to_kernel.astype(kernel.dtype)


_conv.defvjp(_conv_and_residuals, _gradients_of_conv)


def _weight_gradient_and_residuals(x, cotangent, padding, dtype, use_onednn):
    return _weight_gradient(x, cotangent, padding, dtype, use_onednn), (x, cotangent)


def _gradients_of_weight_gradient(padding, dtype, use_onednn, residuals, kernel):
    x, cotangent = residuals
    transposed = _transposed_padding(kernel, padding)
    to_x = _conv(cotangent.astype(kernel.dtype), _transposed_kernel(kernel), transposed, dtype, use_onednn)
    to_cotangent = _conv(x.astype(kernel.dtype), kernel, padding, dtype, use_onednn)
    return to_x.astype(x.dtype), to_cotangent.astype(cotangent.dtype)


_weight_gradient.defvjp(_weight_gradient_and_residuals, _gradients_of_weight_gradient)


def _transposed_kernel(kernel):
    return kernel[::-1, ::-1].swapaxes(2, 3)


def _transposed_padding(kernel, padding):
    return tuple(taps - 1 - edge for taps, edge in zip(kernel.shape[:2], padding, strict=True))
