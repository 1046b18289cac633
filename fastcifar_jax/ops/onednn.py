"""The convolution and its weight gradient by the oneDNN library inside jaxlib, for x86-64 Linux CPUs.

XLA:CPU's own convolutions reach a tenth of its speed (`benchmarks/`). The call is internal to jaxlib, and a case that
oneDNN does not support ends the process: `backend.conv_backend` decides whether it may be used at all, `supports` for
which arrays.

Both passes are the same call; they differ in which axes of the arrays are declared as batch, features and space:

    output           y[n h w k]  = sum_ijc x[n h+i w+j c] w[i j c k]
    weight gradient  w'[i j c k] = sum_nhw x[n h+i w+j c] g[n h w k]: a 3-D convolution of one "image", the volume
                     (H, W, C) with n as its features, and a window of (H, W, 1)
"""

import json
import math

import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike

from fastcifar_jax.ops.lax_conv import Kernel, Padding
from fastcifar_jax.types import Images

TARGET = "__onednn$convolution"
# Operands and result; `conv` converts float16 to float32 and back.
DTYPES = {("float32", "float32"), ("float16", "float16"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")}
_CHUNK = 32  # images whose transposed copy stays in the cache
_SMALL_MAP_CHUNK = 128  # the same, for maps of up to 32 pixels
_MAX_CHUNKS = 32
_NARROW = 5  # maps of up to this many columns are convolved side by side,
_SIDE_BY_SIDE = 16  # this many at a time


def supports(x: Images, kernel: Kernel, operand_dtype: jnp.dtype) -> bool:
    """Whether the call may be made: the dtypes that `onednn_check` tries, and arrays that are not empty."""
    return (operand_dtype.name, x.dtype.name) in DTYPES and x.size > 0 and kernel.size > 0


def conv(x: Images, kernel: Kernel, padding: Padding, out_dtype: DTypeLike) -> Images:
    """The output, in `out_dtype`."""
    (batch, rows, columns, _), (height, width, _, features) = x.shape, kernel.shape
    group, gap = math.gcd(batch, _SIDE_BY_SIDE), padding[1][0]
    narrow = columns <= _NARROW and group > 1 and padding[1] == (gap, gap) and width == 2 * gap + 1
    if narrow:
        # oneDNN takes several pixels of one row at a time; rows of four would leave most of a matrix unit idle.
        # Columns of zeros keep the images apart.
        x = x.reshape(batch // group, group, rows, columns, -1).swapaxes(1, 2)
        x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, gap), (0, 0)))
        x = x.reshape(batch // group, rows, group * (columns + gap), -1)
    sides = (x.shape[1] + sum(padding[0]) - height + 1, x.shape[2] + sum(padding[1]) - width + 1)
    out = jax.ShapeDtypeStruct((x.shape[0], *sides, features), out_dtype)
    y = _call(x, kernel, out, (0, 3, 1, 2), (2, 3, 0, 1), (height, width), padding)
    if narrow:
        y = y.reshape(batch // group, sides[0], group, columns + gap, features)[:, :, :, :columns]
        y = y.swapaxes(1, 2).reshape(batch, sides[0], columns, features)
    return y


def weight_gradient(x: Images, cotangent: Images, padding: Padding) -> Kernel:
    """The gradient with respect to the kernel, in float32, summed over chunks of the batch."""
    batch, rows, columns, _ = x.shape
    chunk = max(_SMALL_MAP_CHUNK if rows * columns <= 32 else _CHUNK, -(-batch // _MAX_CHUNKS))
    # A Python loop, so that XLA can copy one chunk while another is multiplied.
    starts = range(0, batch, chunk)
    return sum(_weight_gradient_of_chunk(x[i : i + chunk], cotangent[i : i + chunk], padding) for i in starts)


def _weight_gradient_of_chunk(x, cotangent, padding):
    (_, rows, columns, inputs), (_, *window, outputs) = x.shape, cotangent.shape
    sides = (rows, columns)
    height, width = (side + sum(edges) - taps + 1 for side, edges, taps in zip(sides, padding, window, strict=True))
    axes = (0, 4, 1, 2, 3)
    out = jax.ShapeDtypeStruct((1, height, width, inputs, outputs), jnp.float32)
    volume, kernel = x.transpose(1, 2, 3, 0)[None], cotangent[:, :, :, None]
    return _call(volume, kernel, out, axes, axes, (*window, 1), (*padding, (0, 0)))[0]


def _call(x, kernel, out, axes, kernel_axes, window, padding):
    """oneDNN's convolution of `x` with `kernel`.

    Args:
      x: the array that is convolved.
      kernel: the array that it is convolved with.
      out: shape and dtype of the result, in the layout of `x`.
      axes: those of `x` and `out` that are batch, features, and space.
      kernel_axes: those of `kernel` that are input features, output features, and space.
      window: the kernel's size in space.
      padding: zeros before and after each axis of space.
    """
    strings = lambda values: [str(value) for value in values]
    ones = strings([1] * len(window))
    data = {"batch_dim": str(axes[0]), "feature_dim": str(axes[1]), "spatial_dims": strings(axes[2:])}
    inputs, outputs, *space = strings(kernel_axes)
    filters = {"input_feature_dim": inputs, "output_feature_dim": outputs, "spatial_dims": space}
    left, right = (strings(edges) for edges in zip(*padding, strict=True))
    dims = str(len(axes))
    config = {
        "dims": dims,
        "feature_groups": "1",
        "input": {"dims": dims, "data": data},
        "output": {"dims": dims, "data": data},
        "kernel": {"dims": dims, "filter": filters},
        "window": {
            "size": strings(window),
            "pad_left": left,
            "pad_right": right,
            "strides": ones,
            "window_dilations": ones,
        },
    }
    call = jax.ffi.ffi_call(
        TARGET,
        out,
        vmap_method="sequential",
        custom_call_api_version=1,
        legacy_backend_config=json.dumps({"onednn_conv_config": config}),
    )
    return call(x, kernel)
