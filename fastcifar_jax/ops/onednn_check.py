"""A program that compares oneDNN's convolution and both gradients with lax, for each supported pair of dtypes.

`backend.check_onednn` runs it in another process, which a call that oneDNN does not support would end.
"""

import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastcifar_jax.ops import lax_conv, onednn
from fastcifar_jax.ops.conv import conv

_CASES = (  # batch, height, width, input channels, output channels, kernel size, padding, pooling windows
    (2, 8, 8, 16, 32, 3, "SAME", 1),
    (1, 5, 7, 27, 13, 1, "SAME", 1),
    (1, 3, 3, 3, 5, 3, "SAME", 1),
    (33, 4, 4, 8, 24, 3, "SAME", 1),
    (33, 7, 7, 8, 24, 3, "SAME", 2),
    (3, 8, 9, 3, 24, 2, "VALID", 1),
)
# Per operand dtype, as a fraction of the largest value.
_TOLERANCES = {"float32": 1e-4, "float16": 3e-3, "bfloat16": 2e-2}


def main() -> None:
    """Exits with a message if a result differs from lax in float32 by more than the tolerance."""
    for batch, height, width, inputs, outputs, size, padding, pool in _CASES:
        margin = size // 2 if padding == "SAME" else 0
        margins = ((margin, margin - height % pool), (margin, margin - width % pool))
        by_lax, rng = functools.partial(lax_conv.conv, padding=margins), np.random.default_rng(0)
        normal = lambda *shape, rng=rng: jnp.asarray(rng.normal(size=shape), jnp.float32)
        x, kernel = normal(batch, height, width, inputs), normal(size, size, inputs, outputs)
        arrays = (x, kernel, normal(*jax.eval_shape(by_lax, x, kernel).shape))
        exact = _three_passes(by_lax, *arrays)
        for operands, result in sorted(onednn.DTYPES):
            options: dict[str, Any] = {"operand_dtype": operands, "padding": padding, "pool": (pool, pool)}
            f = lambda x, kernel, result=result, options=options: conv(x.astype(result), kernel, **options)
            for name, found, expected in zip(("y", "dx", "dw"), _three_passes(f, *arrays), exact, strict=True):
                error = float(jnp.abs(found.astype(jnp.float32) - expected).max() / jnp.abs(expected).max())
                if not error < _TOLERANCES[operands]:
                    sys.exit(f"{name} of {operands} -> {result} is off by {error:.1e} of the largest value")


@functools.partial(jax.jit, static_argnums=0)
def _three_passes(f, x, kernel, cotangent):
    y, gradients = jax.vjp(f, x, kernel)
    return (y, *gradients(cotangent.astype(y.dtype)))


if __name__ == "__main__":
    main()
