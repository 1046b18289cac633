"""The nine-layer residual network of cifar10-fast."""

import dataclasses
from collections.abc import Callable
from typing import Literal, get_args

import flax.linen as nn
from jaxtyping import Array

from fastcifar_jax.models.activations import Relu
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

PoolOrder = Literal["conv_norm_act_pool", "conv_norm_pool_act", "conv_pool_norm_act"]


@dataclasses.dataclass(frozen=True)
class ResNet9:
    """The nine-layer residual network of cifar10-fast (section 1.1 of the specification).

    Attributes:
      channels: output channels of prep, layer1, layer2 and layer3.
      pool_order: order of the operations in blocks that pool. Pooling before or after the activation is the same
        function if that is monotonic; pooling before the norm changes the statistics to those of the pooled map.
      activation: elementwise function.
      norm: the norm of every convolution except the whitening.
      whiten: whether fixed whitening filters precede prep's convolution, which then is 1x1.
      whiten_eps: added to the eigenvalues of the patches' second moments.
      output_scale: factor of the logits.
      res_layers: layers with a residual pair of convolutions; no activation follows the sum.
      extra_layers: layers with one more convolution of the same width, after the residual pair.
      dirac: whether the first filters of each 3x3 convolution start as the identity (airbench.md, section 3).
    """

    channels: tuple[int, int, int, int] = (64, 128, 256, 512)
    pool_order: PoolOrder = "conv_norm_act_pool"
    activation: Callable[[Array], Array] = Relu()
    norm: BatchNormConfig = BatchNormConfig()
    whiten: bool = False
    whiten_eps: float = 1e-2
    output_scale: float = 1 / 8
    res_layers: tuple[str, ...] = ("layer1", "layer3")
    extra_layers: tuple[str, ...] = ()
    dirac: bool = False

    def __post_init__(self):
        layers = {"layer1", "layer2", "layer3"}
        if len(self.channels) != 4 or min(self.channels) < 1:
            raise ValueError(f"channels are {self.channels}; give four numbers >= 1: prep, layer1, layer2, layer3")
        if self.pool_order not in get_args(PoolOrder):
            raise ValueError(f"pool_order is {self.pool_order!r}; choose one of {', '.join(get_args(PoolOrder))}")
        if unknown := {*self.res_layers, *self.extra_layers} - layers:
            raise ValueError(f"res_layers and extra_layers name {sorted(unknown)}; choose from {sorted(layers)}")

    def with_width(self, width: int) -> "ResNet9":
        """The same network with `width`, 2, 4 and 8 times `width` channels (64 is the original)."""
        return dataclasses.replace(self, channels=(width, 2 * width, 4 * width, 8 * width))

    def __call__(self, num_classes: int, compute_dtype: str = "float32") -> Model:
        """The network's functions for `num_classes` classes, computed in `PRECISIONS[compute_dtype]`."""
        return linen_model(_ResNet9(self, num_classes, PRECISIONS[compute_dtype]), self.norm)


class _Whiten(nn.Module):
    """A fixed 3x3 convolution with whitening filters of the images that the network is initialised with."""

    eps: float
    precision: Precision

    @nn.compact
    def __call__(self, images):
        make = lambda: whitening_filters(images.astype(self.precision.params), 3, self.eps)
        kernel = self.variable("constants", "kernel", make).value
        self.sow("macs", "macs", images.shape[1] * images.shape[2] * kernel.size)
        return conv(images.astype(self.precision.activations), kernel, self.precision.operands)


class _Block(nn.Module):
    """Convolution, norm and activation, and a 2x2 max-pool among them if asked for."""

    config: ResNet9
    features: int
    precision: Precision
    size: int = 3
    pool: bool = False

    @nn.compact
    def __call__(self, x, train):
        order = self.config.pool_order if self.pool else "conv_norm_act"
        # A monotonic activation commutes with the pool, which can then be computed together with the norm.
        monotonic = getattr(self.config.activation, "MONOTONIC", False)
        joined = order == "conv_norm_pool_act" or (order == "conv_norm_act_pool" and monotonic)
        order = "conv_norm_act" if joined else order
        for layer in order.split("_"):
            if layer == "conv":
                kernel_init = dirac if self.config.dirac and self.size > 1 else torch_uniform
                x = Conv(self.features, self.size, self.precision, kernel_init, name="conv")(x)
            elif layer == "norm":
                pool = (2, 2) if joined else None
                x = GhostBatchNorm(self.config.norm, self.precision, pool, name="norm")(x, train)
            elif layer == "act":
                x = Activation(self.config.activation, name="act")(x)
            else:
                x = MaxPool(name="pool")(x)
        return x


class _Layer(nn.Module):
    """A block with a pool, then the residual pair and the extra block if the layer has them."""

    config: ResNet9
    features: int
    precision: Precision

    @nn.compact
    def __call__(self, x, train):
        block = lambda name, pool=False: _Block(self.config, self.features, self.precision, pool=pool, name=name)
        x = block("block", pool=True)(x, train)
        if self.name in self.config.res_layers:
            x = Add(name="add")(x, block("res2")(block("res1")(x, train), train))  # no activation after the sum
        if self.name in self.config.extra_layers:
            x = block("extra")(x, train)
        return x


class _ResNet9(nn.Module):
    config: ResNet9
    num_classes: int
    precision: Precision

    @nn.compact
    def __call__(self, images, train):
        config, precision = self.config, self.precision
        if config.whiten:
            x = _Whiten(config.whiten_eps, precision, name="whiten")(images)
        else:
            x = images.astype(precision.activations)
        prep_size = 1 if config.whiten else 3
        x = _Block(config, config.channels[0], precision, size=prep_size, name="prep")(x, train)
        for i, features in enumerate(config.channels[1:], start=1):
            x = _Layer(config, features, precision, name=f"layer{i}")(x, train)
        return linear_head(self, x, self.num_classes, precision) * config.output_scale  # 4x4 for images of 32x32
