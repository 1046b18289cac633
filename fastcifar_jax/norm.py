"""Normalisation by the statistics of ghost groups, with a gradient that passes over the maps as few times as it can."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from fastcifar_jax.types import Images

Statistics = Float[Array, "groups channels"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def normalize_groups(
    x: Images, scale: Float[Array, " channels"], bias: Float[Array, " channels"], num_groups: int, eps: float
) -> tuple[Images, Statistics, Statistics]:
    """Batch norm in training mode, separately for the images n with the same `n % num_groups`.

    Written out because the gradient that JAX derives keeps and reads more arrays of the maps' size, and those passes
    over memory are what a norm costs on a CPU.

    Args:
      x: NHWC; computed in the dtype of `scale`. The batch is a multiple of `num_groups`.
      scale: of the normalised maps.
      bias: added to them.
      num_groups: ghost groups in the batch.
      eps: added to the variances.

    Returns:
      The maps in `x.dtype`, and the means and biased variances of the groups. No gradient flows through the
      statistics: they are for the running averages.
    """
    return _normalize_and_residuals(x, scale, bias, num_groups, eps)[0]


def _normalize_and_residuals(x, scale, bias, num_groups, eps):
    grouped = _group(x, num_groups).astype(scale.dtype)
    mean = grouped.mean((0, 2))
    variance = jnp.square(grouped - _over_maps(mean)).mean((0, 2))  # E[x^2] - E[x]^2 would lose digits
    inverse = lax.rsqrt(variance + eps)
    weight = inverse * scale[None, :]
    y = _affine(grouped, weight, bias[None, :] - mean * weight)
    return (y.reshape(x.shape).astype(x.dtype), mean, variance), (x, scale, mean, inverse)


def _gradients(num_groups, eps, residuals, cotangents):
    del eps
    x, scale, mean, inverse = residuals
    # The barrier has the cotangent computed once, and what is made of x not before it is needed.
    x, cotangent = lax.optimization_barrier((x, cotangents[0]))
    grouped, cotangent = (_group(a, num_groups).astype(scale.dtype) for a in (x, cotangent))
    total = cotangent.sum((0, 2))
    moment = (cotangent * (grouped - _over_maps(mean))).sum((0, 2)) * inverse
    size, weight = grouped.shape[0] * grouped.shape[2], inverse * scale[None, :]
    # weight * (cotangent - total / size - normalised * moment / size), gathered into one factor of each array
    of_x = weight * inverse * moment / size
    to_x = _affine(cotangent, weight, -weight * total / size) + _affine(grouped, -of_x, mean * of_x)
    return to_x.reshape(x.shape).astype(x.dtype), moment.sum(0), total.sum(0)


normalize_groups.defvjp(_normalize_and_residuals, _gradients)


def _group(x, num_groups):
    """[batch, height, width, channels] -> [batch / groups, groups, height * width, channels]."""
    batch, height, width, channels = x.shape
    return x.reshape(batch // num_groups, num_groups, height * width, channels)


def _over_maps(statistics):
    """[groups, channels] -> [1, groups, 1, channels]."""
    return statistics[None, :, None, :]


def _affine(grouped, factor, shift):
    """`grouped * factor + shift`; the barrier keeps XLA from computing the factors anew for every element."""
    factor, shift = lax.optimization_barrier((factor, shift))
    return grouped * _over_maps(factor) + _over_maps(shift)
