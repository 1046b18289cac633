"""The one convolution of every model, the fastest safe way per platform. The only file that knows platforms.

On GPUs and TPUs, and wherever nothing better is known to work, `lax.conv_general_dilated`. On x86-64 Linux CPUs the
oneDNN library inside jaxlib, called directly, because XLA:CPU's own convolutions reach a tenth of its speed
(`benchmarks/`). That call is internal to jaxlib, and a case that it does not support ends the process, so it is used
only where a trial in another process has gone well: see `onednn_check.py`.

All three passes are the same call; what differs is which axis of which array it is told is the batch, the features or
the space:

    output           y[n h w k]  = sum_ijc x[n h+i w+j c] w[i j c k]
    input gradient   the same, with w turned by 180 degrees and its channel axes exchanged, and the padding that gives
                     the input's size back
    weight gradient  w'[i j c k] = sum_nhw x[n h+i w+j c] g[n h w k]: a 3-D convolution of one "image", the volume
                     (H, W, C) with n as its features, and a window of (H, W, 1)
"""

import contextlib
import ctypes
import functools
import json
import math
import os
import platform
from pathlib import Path
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, DTypeLike, Float

from fastcifar_jax.ops import onednn_check
from fastcifar_jax.types import Images

Kernel = Float[Array, "height width inputs outputs"]
ConvBackend = Literal["lax", "onednn"]
Driver = Literal["python", "scan"]  # of the training loop
Padding = tuple[int, int]  # zeros above and below, and left and right

_TARGET = "__onednn$convolution"
_CHUNK = 32  # images whose transposed copy stays in the cache
_SMALL_MAP_CHUNK = 128  # the same, for maps of up to 32 pixels
_MOST_CHUNKS = 32
_NARROW = 5  # columns; images of so few are convolved side by side
_BESIDE = 16  # as many of them
_GAP = 2**30  # bytes of address space for what is small


def conv_backend() -> tuple[ConvBackend, str]:
    """How convolutions are computed here, and why in a few words.

    `FASTCIFAR_CONV=lax|onednn` forces a way, without a trial.

    Raises:
      ValueError: `FASTCIFAR_CONV` has another value.
    """
    forced = os.environ.get("FASTCIFAR_CONV")
    if forced in ("lax", "onednn"):
        return cast(ConvBackend, forced), f"forced by FASTCIFAR_CONV={forced}"
    if forced:
        raise ValueError(f"FASTCIFAR_CONV is {forced!r}; set it to lax or onednn, or unset it")
    if jax.default_backend() != "cpu":
        return "lax", f"the default backend is {jax.default_backend()}"
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return "lax", f"no oneDNN in jaxlib for {platform.system()} {platform.machine()}"
    return _tried()


@functools.cache
def _tried() -> tuple[ConvBackend, str]:
    works, reason = onednn_check.outcome()
    return ("onednn", reason) if works else ("lax", reason)


def conv(
    x: Images, kernel: Kernel, operand_dtype: DTypeLike | None = None, padding: Literal["SAME", "VALID"] = "SAME"
) -> Images:
    """Cross-correlation with stride 1.

    Args:
      x: NHWC.
      kernel: HWIO; a master copy in another dtype than `x` is cast.
      operand_dtype: dtype of both operands of the products; `x.dtype` when None. The result has `x.dtype`.
      padding: "SAME" pads with zeros to the size of `x`; "VALID" pads nothing.

    Raises:
      ValueError: a kernel that is larger than the maps that it is to fit into.
    """
    dtype = jnp.dtype(x.dtype if operand_dtype is None else operand_dtype)
    size = kernel.shape[:2]
    margin = (size[0] // 2, size[1] // 2) if padding == "SAME" else (0, 0)
    if padding == "SAME" and not (size[0] % 2 and size[1] % 2):  # lax pads an even kernel's maps more at their end
        x = jnp.pad(x, ((0, 0), *(((taps - 1) // 2, taps // 2) for taps in size), (0, 0)))
        margin = (0, 0)
    if any(side + 2 * edge < taps for side, edge, taps in zip(x.shape[1:3], margin, size, strict=True)):
        raise ValueError(f"a kernel of {size[0]}x{size[1]} does not fit into maps of {x.shape[1]}x{x.shape[2]}")
    use_onednn = _fits(x, kernel, dtype) and conv_backend()[0] == "onednn"
    if use_onednn or dtype != x.dtype:
        return _conv(x, kernel, margin, dtype, use_onednn)
    return _lax_conv(x, kernel.astype(dtype), margin)


def _fits(x, kernel, dtype) -> bool:
    """Whether the call knows this case: what the trial has tried, and nothing more."""
    known = {("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")}  # operands, result
    return (dtype.name, x.dtype.name) in known and x.size > 0 and kernel.size > 0


# The three passes are each other's derivatives, so any number of derivatives can be taken. The casts to the operands'
# dtype lie inside, so that results and gradients come out in the caller's dtype without having been rounded to it.


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _conv(x: Images, kernel: Kernel, padding: Padding, dtype: jnp.dtype, use_onednn: bool) -> Images:
    """The convolution in `x.dtype`, from operands in `dtype`; oneDNN is used on CPUs only."""
    operands = (x.astype(dtype), kernel.astype(dtype))
    on_lax = functools.partial(_lax_conv, padding=padding, out_dtype=x.dtype)
    if not use_onednn:
        return on_lax(*operands)
    on_cpu = functools.partial(_onednn_conv, padding=padding, out_dtype=x.dtype)
    return lax.platform_dependent(*operands, cpu=on_cpu, default=on_lax)


def _conv_and_residuals(x, kernel, padding, dtype, use_onednn):
    return _conv(x, kernel, padding, dtype, use_onednn), (x.astype(dtype), kernel)


def _gradients_of_conv(padding, dtype, use_onednn, residuals, cotangent):
    x, kernel = residuals
    to_x = _conv(cotangent, _transposed_kernel(kernel), _transposed_padding(kernel, padding), dtype, use_onednn)
    to_kernel = _weight_gradient(x, cotangent, padding, dtype, use_onednn)
    return to_x, to_kernel.astype(kernel.dtype)


_conv.defvjp(_conv_and_residuals, _gradients_of_conv)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _weight_gradient(x: Images, cotangent: Images, padding: Padding, dtype: jnp.dtype, use_onednn: bool) -> Kernel:
    """The gradient with respect to the kernel, in float32, from operands in `dtype`; its size follows from theirs."""
    operands = (x.astype(dtype), cotangent.astype(dtype))
    on_lax = functools.partial(_lax_weight_gradient, padding=padding)
    if not use_onednn:
        return on_lax(*operands)
    on_cpu = functools.partial(_onednn_weight_gradient, padding=padding)
    return lax.platform_dependent(*operands, cpu=on_cpu, default=on_lax)


def _weight_gradient_and_residuals(x, cotangent, padding, dtype, use_onednn):
    return _weight_gradient(x, cotangent, padding, dtype, use_onednn), (x, cotangent)


def _gradients_of_weight_gradient(padding, dtype, use_onednn, residuals, kernel):
    x, cotangent = residuals
    turned = _transposed_padding(kernel, padding)
    to_x = _conv(cotangent.astype(kernel.dtype), _transposed_kernel(kernel), turned, dtype, use_onednn)
    to_cotangent = _conv(x.astype(kernel.dtype), kernel, padding, dtype, use_onednn)
    return to_x.astype(x.dtype), to_cotangent.astype(cotangent.dtype)


_weight_gradient.defvjp(_weight_gradient_and_residuals, _gradients_of_weight_gradient)


def _transposed_kernel(kernel):
    """The kernel of the gradient with respect to the input: turned by 180 degrees, inputs and outputs exchanged."""
    return kernel[::-1, ::-1].swapaxes(2, 3)


def _transposed_padding(kernel, padding):
    return tuple(taps - 1 - edge for taps, edge in zip(kernel.shape[:2], padding, strict=True))


def _lax_conv(x, kernel, padding, out_dtype=None):
    layout, both = ("NHWC", "HWIO", "NHWC"), [(edge, edge) for edge in padding]
    return lax.conv_general_dilated(x, kernel, (1, 1), both, dimension_numbers=layout, preferred_element_type=out_dtype)


def _lax_weight_gradient(x, cotangent, padding):
    # The images are summed over like input features, and the input features kept like images.
    padding = [(edge, edge) for edge in padding]
    return lax.conv_general_dilated(
        x,
        cotangent,
        (1, 1),
        padding,
        dimension_numbers=("CHWN", "IHWO", "HWNC"),
        preferred_element_type=jnp.float32,
    )


def _onednn_conv(x, kernel, padding, out_dtype):
    (batch, rows, columns, _), (height, width, _, features) = x.shape, kernel.shape
    beside, gap = math.gcd(batch, _BESIDE), padding[1]
    narrow = columns <= _NARROW and beside > 1 and width == 2 * gap + 1
    if narrow:
        # oneDNN takes some pixels of one row at a time: four would leave most of a matrix unit idle. Columns of zeros
        # between the images keep them apart.
        x = x.reshape(batch // beside, beside, rows, columns, -1).swapaxes(1, 2)
        x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, gap), (0, 0)))
        x = x.reshape(batch // beside, rows, beside * (columns + gap), -1)
    sides = (x.shape[1] + 2 * padding[0] - height + 1, x.shape[2] + 2 * padding[1] - width + 1)
    out = jax.ShapeDtypeStruct((x.shape[0], *sides, features), out_dtype)
    images = (0, 3, 1, 2)
    y = _call(x, kernel, out, images, (2, 3, 0, 1), (height, width), padding)
    if narrow:
        y = y.reshape(batch // beside, sides[0], beside, columns + gap, features)[:, :, :, :columns]
        y = y.swapaxes(1, 2).reshape(batch, sides[0], columns, features)
    return y


def _onednn_weight_gradient(x, cotangent, padding):
    batch, rows, columns, _ = x.shape
    chunk = max(_SMALL_MAP_CHUNK if rows * columns <= 32 else _CHUNK, -(-batch // _MOST_CHUNKS))
    # Written out and not a loop of XLA's: the copies of one chunk are made while another is in the products.
    starts = range(0, batch, chunk)
    return sum(_onednn_weight_gradient_of_chunk(x[i : i + chunk], cotangent[i : i + chunk], padding) for i in starts)


def _onednn_weight_gradient_of_chunk(x, cotangent, padding):
    (_, rows, columns, inputs), (_, *window_sides, _) = x.shape, cotangent.shape
    height, width = (
        side + 2 * edge - taps + 1 for side, edge, taps in zip((rows, columns), padding, window_sides, strict=True)
    )
    volume, window = x.transpose(1, 2, 3, 0)[None], cotangent[:, :, :, None]
    axes = (0, 4, 1, 2, 3)
    out = jax.ShapeDtypeStruct((1, height, width, inputs, cotangent.shape[3]), jnp.float32)
    return _call(volume, window, out, axes, axes, (*window_sides, 1), (*padding, 0))[0]


def _call(x, kernel, out, axes, kernel_axes, window, padding):
    """oneDNN's convolution.

    Args:
      x: the array that is convolved.
      kernel: the array that it is convolved with.
      out: shape and dtype of the result, laid out like `x`.
      axes: of `x` and `out`: batch, features, then space.
      kernel_axes: input features, output features, then space.
      window: the kernel's size in space.
      padding: on both sides, in space.
    """
    strings = lambda values: [str(value) for value in values]
    ones = strings([1] * len(window))
    data = {
        "dims": str(len(axes)),
        "data": {"batch_dim": str(axes[0]), "feature_dim": str(axes[1]), "spatial_dims": strings(axes[2:])},
    }
    filters = {
        "input_feature_dim": str(kernel_axes[0]),
        "output_feature_dim": str(kernel_axes[1]),
        "spatial_dims": strings(kernel_axes[2:]),
    }
    config = {
        "dims": str(len(axes)),
        "feature_groups": "1",
        "input": data,
        "output": data,
        "kernel": {"dims": str(len(kernel_axes)), "filter": filters},
        "window": {
            "size": strings(window),
            "pad_left": strings(padding),
            "pad_right": strings(padding),
            "strides": ones,
            "window_dilations": ones,
        },
    }
    call = jax.ffi.ffi_call(
        _TARGET,
        out,
        vmap_method="sequential",
        custom_call_api_version=1,
        legacy_backend_config=json.dumps({"onednn_conv_config": config}),
    )
    return call(x, kernel)


def default_driver() -> Driver:
    """ "scan", except where a CPU is left to lax: XLA runs its weight gradients 10 times slower and more in a loop.

    See jax issue 12868 and `benchmarks/drivers.py`.
    """
    return "python" if jax.default_backend() == "cpu" and conv_backend()[0] == "lax" else "scan"


def default_dtype() -> str:
    """The fastest compute dtype that is as accurate as float32: "mixed" where oneDNN multiplies bfloat16 in hardware.

    The comparison is in the README, "On a CPU". No GPU was measured: float32 there.
    """
    return "mixed" if conv_backend()[0] == "onednn" and _multiplies_bfloat16() else "float32"


def _multiplies_bfloat16() -> bool:
    return bool(_cpu_flags() & {"avx512_bf16", "amx_bf16"})


def compiler_options() -> dict[str, Any]:
    """Options for compiling a training program: vectors as wide as the CPU has them, which XLA halves by default."""
    return {"xla_cpu_prefer_vector_width": 512} if "avx512f" in _cpu_flags() and jax.default_backend() == "cpu" else {}


def _cpu_flags() -> set[str]:
    try:
        return set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:  # no Linux
        return set()


def can_sync_each_step() -> bool:
    """Whether a loop may wait for every step: a CPU has nothing to run ahead of, an accelerator would stand idle."""
    return jax.default_backend() == "cpu"


def configure_cpu() -> None:
    """Settings of the whole process that convolutions on a CPU want; call it before anything asks JAX for a device.

    * Freed memory is kept, see `keep_freed_memory`.
    * No persistent compilation cache where oneDNN is called: programs with that call cannot be written to it, and JAX
      would try and warn at every start.
    """
    keep_freed_memory()  # first: asking for the backend starts XLA's threads
    if conv_backend()[0] == "onednn":
        jax.config.update("jax_enable_compilation_cache", False)


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory instead of giving it back to the system; does nothing with another C library.

    XLA:CPU allocates its temporary arrays anew at every call, and PyTorch does so at every operation; faulting their
    pages in again costs several times the work that is done on them. It must come before XLA starts its threads, each
    of which would get an arena of its own that still gives memory back.

    What is small must not settle in the gap that a freed array of 2 GB has left, or the next one would need 2 GB more:
    glibc takes the smallest gap that fits, so it is given one first, which costs address space only until it is used.
    """
    with contextlib.suppress(AttributeError, OSError):  # not glibc
        libc = ctypes.CDLL(None)
        mallopt, malloc, free = libc.mallopt, libc.malloc, libc.free
        malloc.argtypes, malloc.restype, free.argtypes = (ctypes.c_size_t,), ctypes.c_void_p, (ctypes.c_void_p,)
        trim_threshold, mmap_max, arena_max = -1, -4, -8
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)  # never give back
        mallopt(arena_max, 1)
        gap = malloc(_GAP)
        malloc(2**20)  # stays, so that the gap is one
        free(gap)
