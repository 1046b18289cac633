"""Activation functions, as frozen dataclasses so that a recipe can print them."""

import dataclasses
from typing import ClassVar

import jax
from jaxtyping import Array

from fastcifar_jax.ops.activations import celu, gelu


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
        return celu(x, self.alpha)


@dataclasses.dataclass(frozen=True)
class Gelu:
    """`x * Phi(x)`, Phi the normal distribution function: the exact form, not the approximation by tanh."""

    def __call__(self, x: Array) -> Array:
        """Elementwise."""
        return gelu(x)
