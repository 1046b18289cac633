"""The network of airbench: whitening, three groups of convolutions that start as the identity, a linear head."""

import dataclasses
from collections.abc import Callable
from typing import Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from fastcifar_jax.models.activations import Gelu
from fastcifar_jax.models.base import PRECISIONS, Model, Precision
from fastcifar_jax.models.layers import (
    Activation,
    Add,
    BatchNormConfig,
    Conv,
    GhostBatchNorm,
    MaxPool,
    dirac,
    linear_head,
    linen_model,
    torch_uniform,
)
from fastcifar_jax.models.whitening import whitening_filters
from fastcifar_jax.ops.conv import conv

WhitenBias = Literal["zeros", "uniform"]
Head = Literal["uniform", "unit_std"]


@dataclasses.dataclass(frozen=True)
class AirNet:
    """The eight-layer network of airbench94, its wider siblings and their parts (airbench.md, sections 2, 3 and 9).

    Whitening (2x2, no padding, a bias) and activation; per group a convolution, 2x2 max-pool, norm and activation, then
    one or two more convolutions with norm and activation; the maximum of each map; a linear head.

    Attributes:
      channels: output channels of the three groups.
      convs: convolutions per group, 2 or 3. With 3, the input of the second is added to the output of the third norm.
      activation: elementwise function.
      norm: the norm of every convolution except the whitening. The low momentum and Lookahead need each other.
      whiten_eps: added to the eigenvalues of the patches' second moments.
      whiten_bias: initial bias of the whitening, zero or PyTorch's default.
      dirac: whether the first filters of each convolution start as the identity instead of at random.
      head: initial weights of the head, PyTorch's default or that divided by its standard deviation.
      output_scale: factor of the logits.
    """

    channels: tuple[int, int, int] = (64, 256, 256)
    convs: int = 2
    activation: Callable[[Array], Array] = Gelu()
    norm: BatchNormConfig = BatchNormConfig(train_scale=False, momentum=0.6, eps=1e-12)
    whiten_eps: float = 5e-4
    whiten_bias: WhitenBias = "zeros"
    dirac: bool = True
    head: Head = "uniform"
    output_scale: float = 1 / 9

    def __post_init__(self):
        if len(self.channels) != 3 or min(self.channels) < 1:
            raise ValueError(f"channels are {self.channels}; give three numbers >= 1, one per group")
        if self.convs not in (2, 3):
            raise ValueError(f"convs is {self.convs}; a group has 2 or 3 convolutions")
        for name, known in (("whiten_bias", WhitenBias), ("head", Head)):
            if getattr(self, name) not in get_args(known):
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(get_args(known))}")

    def with_width(self, width: int) -> "AirNet":
        """The same network with `width` channels in the first group and the others in proportion."""
        first, second, third = self.channels
        return dataclasses.replace(self, channels=(width, width * second // first, width * third // first))

    def __call__(self, num_classes: int, compute_dtype: str = "float32") -> Model:
        """The network's functions for `num_classes` classes, computed in `PRECISIONS[compute_dtype]`."""
        return linen_model(_AirNet(self, num_classes, PRECISIONS[compute_dtype]), self.norm)


def unit_std(key: PRNGKeyArray, shape: tuple[int, int], dtype: jnp.dtype) -> Array:
    """PyTorch's default divided by its standard deviation (n - 1)."""
    kernel = torch_uniform(key, shape, dtype)
    return kernel / kernel.std(ddof=1)


class _Whiten(nn.Module):
    """Fixed 2x2 filters and their negatives, and a trained bias."""

    config: AirNet
    precision: Precision

    @nn.compact
    def __call__(self, images):
        precision = self.precision

        def make():
            filters = whitening_filters(images.astype(precision.params), 2, self.config.whiten_eps)
            return jnp.concatenate([filters, -filters], axis=3)

        kernel = self.variable("constants", "kernel", make).value
        x = conv(images.astype(precision.activations), kernel, precision.operands, "VALID")
        self.sow("macs", "macs", x.shape[1] * x.shape[2] * kernel.size)
        bound = kernel[..., 0].size ** -0.5 if self.config.whiten_bias == "uniform" else 0.0
        uniform = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
        bias = self.param("bias", uniform if bound else nn.initializers.zeros, kernel.shape[3:], precision.params)
        return x + bias.astype(x.dtype)[None, None, None, :]


class _Unit(nn.Module):
    """Convolution, max-pool if asked for, and norm."""

    config: AirNet
    features: int
    precision: Precision
    pool: bool = False

    @nn.compact
    def __call__(self, x, train):
        kernel_init = dirac if self.config.dirac else torch_uniform
        pool = (2, 2) if self.pool else (1, 1)
        x = Conv(self.features, 3, self.precision, kernel_init, pool, name="conv")(x)
        if self.pool:
            x = MaxPool(name="pool")(x)
        return GhostBatchNorm(self.config.norm, self.precision, name="norm")(x, train)


class _AirNet(nn.Module):
    config: AirNet
    num_classes: int
    precision: Precision

    @nn.compact
    def __call__(self, images, train):
        config, precision = self.config, self.precision
        activate = lambda x: Activation(config.activation)(x)
        x = activate(_Whiten(config, precision, name="whiten")(images))
        for group, features in enumerate(config.channels, start=1):
            unit = lambda i, pool=False, group=group, features=features: _Unit(
                config, features, precision, pool, name=f"group{group}_{i}"
            )
            x = activate(unit(1, pool=True)(x, train))
            skip = x
            x = activate(unit(2)(x, train))
            if config.convs == 3:
                x = activate(Add()(unit(3)(x, train), skip))
        init = unit_std if config.head == "unit_std" else torch_uniform
        return linear_head(self, x, self.num_classes, precision, init) * config.output_scale  # 3x3 for images of 32x32
