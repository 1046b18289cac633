"""CELU and GELU, computed in at least float32, with gradients that suit the platform."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from fastcifar_jax.ops.backend import on_platform


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def celu(x: Array, alpha: float) -> Array:
    """`max(x, 0) + min(alpha * (exp(x / alpha) - 1), 0)`, elementwise, in the dtype of `x`."""
    # Not expm1, which costs XLA:CPU four times as much as exp; the digits lost near 0 are rounding at the size of 1.
    wide = _at_least_float32(x)
    return (jnp.maximum(wide, 0) + alpha * (jnp.exp(jnp.minimum(wide, 0) * (1 / alpha)) - 1)).astype(x.dtype)


def _celu_and_residual(x, alpha):
    y = celu(x, alpha)
    return y, _kept(y, x)


def _celu_gradient(alpha, kept, cotangent):
    """The slope is exp(x / alpha) = y / alpha + 1 below 0 and 1 above."""
    from_value = lambda y, cotangent: cotangent * (jnp.minimum(y, 0) * (1 / alpha) + 1)

    def from_input(x, cotangent):
        slope = jnp.exp(jnp.minimum(_at_least_float32(x), 0) * (1 / alpha))
        return (cotangent.astype(slope.dtype) * slope).astype(cotangent.dtype)

    return (on_platform(from_value, from_input, kept, cotangent),)


celu.defvjp(_celu_and_residual, _celu_gradient)


@jax.custom_vjp
def gelu(x: Array) -> Array:
    """`x * Phi(x)`, Phi the normal distribution function, elementwise, in the dtype of `x`."""
    return _gelu_and_slope(x)[0]


def _gelu_and_slope(x):
    """The value, and the slope `Phi(x) + x * phi(x)`.

    `jax.nn.gelu` uses erfc, of which XLA:CPU computes both branches, and again for the gradient: a step of airbench94
    took 0.97 s with it and takes 0.93 s with this.
    """
    wide = _at_least_float32(x)
    phi = 0.5 + 0.5 * lax.erf(wide * math.sqrt(0.5))
    density = jnp.exp(-0.5 * jnp.square(wide)) * (1 / math.sqrt(2 * math.pi))
    return (wide * phi).astype(x.dtype), (phi + wide * density).astype(x.dtype)


def _gelu_and_residual(x):
    y, slope = _gelu_and_slope(x)
    return y, _kept(slope, x)


def _gelu_gradient(kept, cotangent):
    from_slope = lambda slope, cotangent: cotangent * slope
    from_input = lambda x, cotangent: cotangent * _gelu_and_slope(x)[1]
    return (on_platform(from_slope, from_input, kept, cotangent),)


gelu.defvjp(_gelu_and_residual, _gelu_gradient)


def _at_least_float32(x):
    return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x


def _kept(computed, x):
    """What the gradient needs: on CPUs what the forward pass has computed, elsewhere the input.

    An accelerator computes faster than it reads. There XLA keeps neither the slope nor the input of an activation, but
    computes both again from the norm's input, which it reads anyway.
    """
    return on_platform(lambda computed, x: computed, lambda computed, x: x, computed, x)
