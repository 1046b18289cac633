"""The one convolution of every model: by `lax`, or by oneDNN where `backend.conv_backend` chooses it.

The gradient with respect to the input is a convolution too: of the cotangent with the transposed kernel (turned by 180
degrees, its channel axes exchanged), with the padding that restores the input's size.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike

from fastcifar_jax.ops import lax_conv, onednn
from fastcifar_jax.ops.backend import conv_backend, on_platform
from fastcifar_jax.ops.lax_conv import Kernel, Padding
from fastcifar_jax.types import Images


def conv(
    x: Images,
    kernel: Kernel,
    operand_dtype: DTypeLike | None = None,
    padding: Literal["SAME", "VALID"] = "SAME",
    pool: tuple[int, int] = (1, 1),
) -> Images:
    """Cross-correlation with stride 1.

    Args:
      x: NHWC.
      kernel: HWIO, in any dtype.
      operand_dtype: dtype that both operands are cast to; `x.dtype` when None. The result has `x.dtype`.
      padding: "SAME" pads with zeros to the size of `x`; "VALID" does not pad.
      pool: size of the windows of a pooling that follows. The last rows and columns, which fill no window, are left
        out, as far as padding with fewer zeros leaves them out.

    Raises:
      ValueError: the kernel is larger than the maps.
    """
    dtype = jnp.dtype(x.dtype if operand_dtype is None else operand_dtype)
    size, (height, width) = x.shape[1:3], kernel.shape[:2]
    margin: Padding = ((0, 0), (0, 0))
    if padding == "SAME":  # lax pads more at the end for an even kernel
        before, after = ((height - 1) // 2, (width - 1) // 2), (height // 2, width // 2)
        rest = (side % window for side, window in zip(size, pool, strict=True))
        rows, columns = (a - drop if drop <= a else a for a, drop in zip(after, rest, strict=True))
        margin = ((before[0], rows), (before[1], columns))
    if size[0] + sum(margin[0]) < height or size[1] + sum(margin[1]) < width:
        raise ValueError(f"a kernel of {height}x{width} does not fit into maps of {size[0]}x{size[1]}")
    use_onednn = onednn.supports(x, kernel, dtype) and conv_backend()[0] == "onednn"
    if use_onednn or dtype != x.dtype or dtype.itemsize == 2:
        return _conv(x, kernel, margin, dtype, use_onednn)
    return lax_conv.conv(x, kernel.astype(dtype), margin)


# The three passes are each other's derivatives, so that any number of derivatives can be taken. The casts to the
# operands' dtype lie inside, so that results and gradients have the caller's dtype and were never rounded to theirs.


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _conv(x: Images, kernel: Kernel, padding: Padding, dtype: jnp.dtype, use_onednn: bool) -> Images:
    """The convolution in `x.dtype`, from operands in `dtype`."""
    on_cpu, multiplied = onednn.conv if use_onednn else lax_conv.conv, _multiplied_on_cpu(dtype, use_onednn)
    out_dtype = x.dtype if multiplied == dtype else jnp.float32
    return on_platform(
        lambda a, b: on_cpu(a.astype(multiplied), b.astype(multiplied), padding, out_dtype).astype(x.dtype),
        lambda a, b: lax_conv.conv(a, b, padding, x.dtype),
        x.astype(dtype),
        kernel.astype(dtype),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _weight_gradient(x: Images, cotangent: Images, padding: Padding, dtype: jnp.dtype, use_onednn: bool) -> Kernel:
    """The gradient with respect to the kernel, in float32, from operands in `dtype`."""
    on_cpu, multiplied = onednn if use_onednn else lax_conv, _multiplied_on_cpu(dtype, use_onednn)
    return on_platform(
        lambda a, b: on_cpu.weight_gradient(a.astype(multiplied), b.astype(multiplied), padding),
        lambda a, b: lax_conv.weight_gradient(a, b, padding),
        x.astype(dtype),
        cotangent.astype(dtype),
    )


def _multiplied_on_cpu(dtype, use_onednn):
    """The dtype in which a CPU multiplies operands: float32, which rounds nothing, where half precision is slow.

    XLA:CPU takes a hundred times as long for float16. oneDNN multiplies bfloat16 in hardware where the CPU does.
    """
    slow = dtype.itemsize == 2 and not (use_onednn and dtype == jnp.bfloat16)
    return jnp.dtype(jnp.float32) if slow else dtype


def _conv_and_residuals(x, kernel, padding, dtype, use_onednn):
    return _conv(x, kernel, padding, dtype, use_onednn), (x.astype(dtype), kernel)


def _gradients_of_conv(padding, dtype, use_onednn, residuals, cotangent):
    def on_cpu(x, kernel, cotangent):
        to_x = _conv(cotangent, _transposed_kernel(kernel), _transposed_padding(kernel, padding), dtype, use_onednn)
        return to_x, _weight_gradient(x, cotangent, padding, dtype, use_onednn).astype(kernel.dtype)

    def elsewhere(x, kernel, cotangent):
        # JAX's own gradients, which XLA compiles to cuDNN's. Those of the kernel are added in float32 and rounded last.
        # For a float32 result XLA would convert the operands first, and multiply in float32.
        _, vjp = jax.vjp(lambda x, kernel: lax_conv.conv(x, kernel.astype(dtype), padding), x, kernel)
        to_x, to_kernel = vjp(cotangent.astype(dtype))
        return to_x.astype(cotangent.dtype), to_kernel

    return on_platform(on_cpu, elsewhere, *residuals, cotangent)


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
    return tuple(
        (taps - 1 - before, taps - 1 - after) for taps, (before, after) in zip(kernel.shape[:2], padding, strict=True)
    )
