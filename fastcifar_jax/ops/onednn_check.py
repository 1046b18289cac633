"""A program that compares oneDNN's convolution and both gradients with lax, for each supported pair of dtypes.

`backend.check_onednn` runs it in another process, which a call that oneDNN does not support would end.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np

from fastcifar_jax.ops import lax_conv, onednn
from fastcifar_jax.ops.conv import conv

_CASES = (  # batch, height, width, input channels, output channels, kernel size, padding
    (2, 8, 8, 16, 32, 3, "SAME"),
    (1, 5, 7, 27, 13, 1, "SAME"),
    (1, 3, 3, 3, 5, 3, "SAME"),
    (33, 4, 4, 8, 24, 3, "SAME"),
    (3, 8, 9, 3, 24, 2, "VALID"),
)
_TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2}  # per operand dtype, as a fraction of the largest value


def main() -> None:
    """Exits with a message if a result differs from lax in float32 by more than the tolerance."""
    for batch, height, width, inputs, outputs, size, padding in _CASES:
        margin, edge = (size // 2, 0) if padding == "SAME" else (0, size - 1)
        x, kernel = (batch, height, width, inputs), (size, size, inputs, outputs)
        rng, cotangent = np.random.default_rng(0), (batch, height - edge, width - edge, outputs)
        arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in (x, kernel, cotangent)]
        exact = _three_passes(functools.partial(lax_conv.conv, padding=(margin, margin)), *arrays)
        for operands, result in sorted(onednn.DTYPES):
            f = lambda x, kernel, operands=operands, result=result, padding=padding: conv(
                x.astype(result), kernel, operands, padding
            )
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
