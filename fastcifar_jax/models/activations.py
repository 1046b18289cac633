"""Elementwise functions between the layers, as frozen dataclasses that a recipe can print."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.special import xlogy
from jaxtyping import Array


@dataclasses.dataclass(frozen=True)
class Relu:
    """`max(x, 0)`."""

    MONOTONIC: ClassVar = True

    def __call__(self, x: Array) -> Array:
        """Elementwise."""
        return jax.nn.relu(x)


@dataclasses.dataclass(frozen=True)
class Celu:
    """`max(x, 0) + min(alpha * (exp(x / alpha) - 1), 0)` (Bag of Tricks, "CELU activations")."""

    alpha: float = 0.3

    MONOTONIC: ClassVar = True
    TUNABLE: ClassVar = ("alpha",)

    def __post_init__(self):
        if not self.alpha > 0:
            raise ValueError(f"Celu has alpha {self.alpha}; give a number > 0")

    def __call__(self, x: Array) -> Array:
        """Elementwise."""
        return _celu(x, self.alpha)


@jax.custom_vjp
def _celu(x, alpha):
    # exp - 1 and not expm1, which costs XLA:CPU four times as much; what it loses near 0 is rounding at the size of 1.
    return jnp.maximum(x, 0) + alpha * (jnp.exp(jnp.minimum(x, 0) * (1 / alpha)) - 1)


def _celu_and_residuals(x, alpha):
    y = _celu(x, alpha)
    return y, (y, alpha)


def _celu_gradients(residuals, cotangent):
    """The slopes as functions of the value, which is kept anyway: exp(x / alpha) = y / alpha + 1 below 0, 1 above."""
    y, alpha = residuals
    power = jnp.minimum(y, 0) * (1 / alpha) + 1
    of_alpha = cotangent * (power - 1 - xlogy(power, power))
    return cotangent * power, of_alpha.sum().astype(alpha.dtype)


_celu.defvjp(_celu_and_residuals, _celu_gradients)


@dataclasses.dataclass(frozen=True)
class Gelu:
    """`x * Phi(x)` with the normal distribution's Phi: the exact form, not the one with tanh."""

    def __call__(self, x: Array) -> Array:
        """Elementwise."""
        return _gelu(x)


@jax.custom_vjp
def _gelu(x):
    return _gelu_and_slope(x)[0]


def _gelu_and_slope(x):
    """The value, and the slope `Phi(x) + x * phi(x)`, which is kept in the place of `x`.

    JAX's own goes by way of erfc, whose two branches XLA:CPU computes both, and computes it again for the gradient: a
    step of airbench94 took 0.97 s with it and 0.93 s with this.
    """
    half = jnp.asarray(0.5, x.dtype)
    phi = half + half * lax.erf(x * math.sqrt(0.5))
    density = jnp.exp(-half * jnp.square(x)) * (1 / math.sqrt(2 * math.pi))
    return x * phi, phi + x * density


_gelu.defvjp(_gelu_and_slope, lambda slope, cotangent: (cotangent * slope,))
