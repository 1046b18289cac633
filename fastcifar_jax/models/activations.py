"""Activation functions, as frozen dataclasses so that a recipe can print them."""

import dataclasses
import functools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array


@dataclasses.dataclass(frozen=True)
class Relu:
    """`max(x, 0)`."""

    MONOTONIC: ClassVar = True  # so that it commutes with a maximum

    def __call__(self, x: Array) -> Array:
        """Elementwise."""
        return jax.nn.relu(x)


@dataclasses.dataclass(frozen=True)
class Celu:
    """`max(x, 0) + min(alpha * (exp(x / alpha) - 1), 0)` (Bag of Tricks, "CELU activations")."""

    alpha: float = 0.3

    MONOTONIC: ClassVar = True

    def __post_init__(self):
        if not self.alpha > 0:
            raise ValueError(f"Celu has alpha {self.alpha}; give a number > 0")

    def __call__(self, x: Array) -> Array:
        """Elementwise."""
        return _celu(x, self.alpha)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _celu(x, alpha):
    # Not expm1, which costs XLA:CPU four times as much as exp; the digits lost near 0 are rounding at the size of 1.
    return jnp.maximum(x, 0) + alpha * (jnp.exp(jnp.minimum(x, 0) * (1 / alpha)) - 1)


def _celu_gradient(alpha, y, cotangent):
    """From the value, which is kept anyway: the slope is exp(x / alpha) = y / alpha + 1 below 0 and 1 above."""
    return (cotangent * (jnp.minimum(y, 0) * (1 / alpha) + 1),)


_celu.defvjp(lambda x, alpha: (_celu(x, alpha),) * 2, _celu_gradient)


@dataclasses.dataclass(frozen=True)
class Gelu:
    """`x * Phi(x)`, Phi the normal distribution function: the exact form, not the approximation by tanh."""

    def __call__(self, x: Array) -> Array:
        """Elementwise."""
        return _gelu(x)


@jax.custom_vjp
def _gelu(x):
    return _gelu_and_slope(x)[0]


def _gelu_and_slope(x):
    """The value, and the slope `Phi(x) + x * phi(x)`, which is kept in place of `x`.

    `jax.nn.gelu` uses erfc, of which XLA:CPU computes both branches, and again for the gradient: a step of airbench94
    took 0.97 s with it and takes 0.93 s with this.
    """
    half = jnp.asarray(0.5, x.dtype)
    phi = half + half * lax.erf(x * math.sqrt(0.5))
    density = jnp.exp(-half * jnp.square(x)) * (1 / math.sqrt(2 * math.pi))
    return x * phi, phi + x * density


_gelu.defvjp(_gelu_and_slope, lambda slope, cotangent: (cotangent * slope,))
