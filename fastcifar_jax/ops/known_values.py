"""Ten values that are known beforehand, computed on the device: a driver or a compiler may compute wrong ones.

The first ones are those of jax issue 40633: from jax 0.11.0 on, with driver 610.43 on an RTX A6000, single operations
outside a jitted function gave sqrt(512) = 0, ones(4) + 1 = 513, NaN for normal numbers and values outside their range
for uniform numbers and integers, without an error.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random


class KnownValue(NamedTuple):
    """A function, its argument (never a constant, which the compiler would fold), and the right result."""

    name: str
    function: Callable
    argument: np.generic | np.ndarray
    expected: float | np.ndarray
    tolerance: float = 0.0  # absolute


def _window_sums(x):
    return lax.conv_general_dilated(x, jnp.ones_like(x)[:, :, :3, :3], (1, 1), "VALID")


_SEED, _ONES = np.uint32(0), np.ones((64, 64), np.float32)
# Random numbers depend on the version of JAX, so their statistics are compared, within 5 standard errors.
VALUES = (
    KnownValue("sqrt(512)", jnp.sqrt, np.float32(512), 22.627417, 1e-4),
    KnownValue("ones(4) + 1", lambda x: x + 1, np.ones(4, np.float32), 2.0),
    KnownValue("the sum of 0 to 9", jnp.sum, np.arange(10, dtype=np.int32), 45.0),
    KnownValue("a product of ones", lambda x: x @ x, _ONES, 64.0),
    KnownValue("a product of ones in float16", lambda x: x @ x, _ONES.astype(np.float16), 64.0),
    KnownValue("a convolution of ones", _window_sums, np.ones((1, 1, 8, 8), np.float32), 9.0),
    KnownValue(
        "the standard deviation of normal numbers",
        lambda seed: random.normal(random.key(seed), (1000,)).std(),
        _SEED, 1.0, 0.12,
    ),
    KnownValue(
        "the mean of uniform numbers", lambda seed: random.uniform(random.key(seed), (1000,)).mean(), _SEED, 0.5, 0.05
    ),
    KnownValue(
        "the mean of integers below 32000",
        lambda seed: random.randint(random.key(seed), (1000,), 0, 32000).astype(jnp.float32).mean(),
        _SEED, 16000.0, 1500.0,
    ),
    KnownValue(
        "a sorted permutation",
        lambda seed: jnp.sort(random.permutation(random.key(seed), 100)),
        _SEED, np.arange(100.0),
    ),
)  # fmt: skip


def wrong_values(values: Sequence[KnownValue] = VALUES) -> dict[str, str]:
    """The names of the values that the device computes wrongly or not at all, and what comes out instead."""
    faults = {value.name: [fault for jitted in (True, False) if (fault := _fault(value, jitted))] for value in values}
    return {name: " and ".join(found) for name, found in faults.items() if found}


def _fault(value: KnownValue, jitted: bool) -> str | None:
    how = "jitted" if jitted else "not jitted"
    try:
        with jax.disable_jit(not jitted):
            found = np.asarray(jax.jit(value.function)(value.argument), np.float64)
    except jax.errors.JaxRuntimeError as error:
        return f"fails ({how}): {' '.join(str(error).split())[:200]}"
    wrong = ~np.isclose(found, value.expected, rtol=0, atol=value.tolerance)
    if not wrong.any():
        return None
    expected = np.broadcast_to(value.expected, found.shape)
    return f"is {found[wrong][0]:g} instead of {expected[wrong][0]:g} ({how})"
