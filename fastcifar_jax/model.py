"""Networks as a pair of pure functions. The only importer of flax."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from fastcifar_jax.conv import conv
from fastcifar_jax.norm import groups_here, normalize_groups
from fastcifar_jax.pooling import max_pool
from fastcifar_jax.types import Images, Logits, Params
from fastcifar_jax.whitening import whitening_filters

Variables = dict[str, Params]  # the collections "params", "frozen" and "batch_stats"
PoolOrder = Literal["conv_norm_act_pool", "conv_norm_pool_act", "conv_pool_norm_act"]


class Precision(NamedTuple):
    """The dtypes of one compute policy."""

    params: Any  # master copies of the weights
    activations: Any  # between the layers
    operands: Any  # of the convolutions' and the head's products


PRECISIONS = {
    "float32": Precision(jnp.float32, jnp.float32, jnp.float32),
    "mixed": Precision(jnp.float32, jnp.float32, jnp.bfloat16),
    "bfloat16": Precision(jnp.float32, jnp.bfloat16, jnp.bfloat16),
    "float16": Precision(jnp.float32, jnp.float16, jnp.float16),
    "float64": Precision(jnp.float64, jnp.float64, jnp.float64),  # needs jax_enable_x64; for comparisons
}


class Model(NamedTuple):
    """A network: pure functions over plain nested dicts of arrays in three collections.

    Attributes:
      init: `(key, images) -> variables`; the images are normalised training images, which whitening learns from.
      apply: `(variables, images, train) -> (logits, batch_stats)`; logits have the dtype of the weights.
      enter_evaluation: `batch_stats -> batch_stats`, called when the copy of the network that is evaluated leaves
        training; the identity for most.
      macs: `(variables, images) -> nested dict` of the multiply-accumulates of one image's forward pass, layer by
        layer; evaluates shapes only.
      num_groups: ghost groups in a training batch, the first axis of every leaf of `batch_stats`; image n belongs to
        group `n % num_groups`.
      split: `axis_name -> Model` for devices that each train on their `norm.share_of_batch`, inside `jax.shard_map`
        over a mesh with that axis; None where the network knows no such thing.
    """

    init: Callable[[PRNGKeyArray, Images], Variables]
    apply: Callable[[Variables, Images, bool], tuple[Logits, Params]]
    enter_evaluation: Callable[[Params], Params]
    macs: Callable[[Variables, Images], dict[str, Any]]
    num_groups: int = 1
    split: Callable[[str], "Model"] | None = None


class Network(Protocol):
    """What `Recipe.model` must be: a frozen dataclass that builds a `Model` for a number of classes."""

    def __call__(self, num_classes: int, compute_dtype: str) -> Model:
        """The network's functions; `compute_dtype` is a key of `PRECISIONS`."""
        ...

    def with_width(self, width: int) -> "Network":
        """The same network, wider or narrower; the first layer gets `width` channels."""
        ...


@dataclasses.dataclass(frozen=True)
class Relu:
    """`max(x, 0)`."""

    def __call__(self, x: Array) -> Array:
        """Elementwise."""
        return nn.relu(x)


@dataclasses.dataclass(frozen=True)
class Celu:
    """`max(x, 0) + min(alpha * (exp(x / alpha) - 1), 0)` (Bag of Tricks, "CELU activations")."""

    alpha: float = 0.3

    def __post_init__(self):
        if not self.alpha > 0:
            raise ValueError(f"Celu has alpha {self.alpha}; give a number > 0")

    def __call__(self, x: Array) -> Array:
        """Elementwise."""
        return _celu(x, self.alpha)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _celu(x, alpha):
    # exp - 1 and not expm1, which costs XLA:CPU four times as much; what it loses near 0 is rounding at the size of 1.
    return jnp.maximum(x, 0) + alpha * (jnp.exp(jnp.minimum(x, 0) / alpha) - 1)


def _celu_gradient(alpha, y, cotangent):
    """The slope as a function of the value, which is kept anyway: 1 above 0, exp(x / alpha) = y / alpha + 1 below."""
    return (cotangent * (jnp.minimum(y, 0) / alpha + 1),)


_celu.defvjp(lambda x, alpha: (_celu(x, alpha),) * 2, _celu_gradient)


@dataclasses.dataclass(frozen=True)
class Norm:
    """Batch norm over groups of a batch (sections 1.3 to 1.5 of the specification).

    Attributes:
      num_groups: ghost groups in a batch; image n belongs to group `n % num_groups`. 1 is ordinary batch norm.
      train_scale: False keeps the scales at 1, outside the trained parameters.
      momentum: share of the running statistics that a step keeps (1 minus PyTorch's momentum).
      eps: added to the variance.
      faithful: evaluate with group 0's running statistics as the original does under an EMA, instead of the mean
        over the groups.
    """

    num_groups: int = 1
    train_scale: bool = True
    momentum: float = 0.9
    eps: float = 1e-5
    faithful: bool = False

    def __post_init__(self):
        if self.num_groups < 1 or not 0 <= self.momentum < 1 or not self.eps > 0:
            raise ValueError(
                f"Norm has num_groups {self.num_groups}, momentum {self.momentum}, eps {self.eps}; "
                "expected num_groups >= 1, 0 <= momentum < 1, eps > 0"
            )


@dataclasses.dataclass(frozen=True)
class ResNet9:
    """The nine-layer residual network of cifar10-fast (section 1.1 of the specification).

    Attributes:
      channels: of prep, layer1, layer2 and layer3.
      pool_order: of the blocks that pool. Pooling before the activation is the same function as after it; before
        the norm it is another function and the statistics are those of the pooled map.
      activation: elementwise.
      norm: of every convolution but the whitening.
      whiten: precedes prep's convolution, then 1x1, by a fixed bank of whitening filters.
      whiten_eps: added to the eigenvalues of the patches' second moments.
      output_scale: multiplies the logits.
      res_layers: layers that end with a residual pair of convolutions; no activation after the sum.
      extra_layers: layers that get one more convolution of the same width, after the residual.
    """

    channels: tuple[int, int, int, int] = (64, 128, 256, 512)
    pool_order: PoolOrder = "conv_norm_act_pool"
    activation: Callable[[Array], Array] = Relu()
    norm: Norm = Norm()
    whiten: bool = False
    whiten_eps: float = 1e-2
    output_scale: float = 1 / 8
    res_layers: tuple[str, ...] = ("layer1", "layer3")
    extra_layers: tuple[str, ...] = ()

    def __post_init__(self):
        layers = {"layer1", "layer2", "layer3"}
        if len(self.channels) != 4 or min(self.channels) < 1:
            raise ValueError(f"channels are {self.channels}; give four numbers >= 1: prep, layer1, layer2, layer3")
        if self.pool_order not in get_args(PoolOrder):
            raise ValueError(f"pool_order is {self.pool_order!r}; choose one of {', '.join(get_args(PoolOrder))}")
        if unknown := {*self.res_layers, *self.extra_layers} - layers:
            raise ValueError(f"res_layers and extra_layers name {sorted(unknown)}; there are {sorted(layers)}")

    def with_width(self, width: int) -> "ResNet9":
        """The same network with `width`, 2, 4 and 8 times `width` channels (64 is the original)."""
        return dataclasses.replace(self, channels=(width, 2 * width, 4 * width, 8 * width))

    def __call__(self, num_classes: int, compute_dtype: str = "float32") -> Model:
        """The network's functions.

        Args:
          num_classes: size of the logits.
          compute_dtype: a key of `PRECISIONS`.
        """
        net = _ResNet9(self, num_classes, PRECISIONS[compute_dtype])
        return _linen_model(net, self.norm)


def _linen_model(net: nn.Module, norm: Norm) -> Model:
    def init(key, images):
        variables = net.init(key, images, train=False)  # so that any number of images will do
        return {name: variables.get(name, {}) for name in ("params", "frozen", "batch_stats")}

    def apply(variables, images, train):
        if not train:
            return net.apply(variables, images, train=False), variables["batch_stats"]
        logits, updated = net.apply(variables, images, train=True, mutable=["batch_stats"])
        return logits, updated["batch_stats"]

    def enter_evaluation(batch_stats):
        # The mean over groups is linear, as are the running statistics, so without `faithful` it makes no
        # difference whether the merged values are written back; evaluation takes the mean.
        return jax.tree.map(_merge_groups, batch_stats) if norm.faithful else batch_stats

    def macs(variables, images):
        found = {}

        def trace(variables, images):
            found.update(net.apply(variables, images[:1], train=False, mutable=["macs"])[1]["macs"])

        jax.eval_shape(trace, variables, images)
        return found

    def split(axis_name):
        return _linen_model(net.clone(axis_name=axis_name), norm)

    return Model(init, apply, enter_evaluation, macs, norm.num_groups, split)


def _merge_groups(statistics: Array) -> Array:
    return jnp.broadcast_to(statistics.mean(0, keepdims=True), statistics.shape)


def _over_maps(channels: Array) -> Array:
    return channels[None, None, None, :]


def _torch_uniform(key, shape, dtype):
    """PyTorch's default, U(-1/sqrt(fan_in), 1/sqrt(fan_in)); flax's own default is sqrt(3) wider."""
    return nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")(key, shape, dtype)


class _Conv(nn.Module):
    features: int
    size: int
    precision: Precision

    @nn.compact
    def __call__(self, x):
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", _torch_uniform, shape, self.precision.params)
        self.sow("macs", "macs", x.shape[1] * x.shape[2] * kernel.size)
        return conv(x, kernel, self.precision.operands)


class _Whiten(nn.Module):
    """A fixed 3x3 convolution whose filters come from the images that the network is initialised with."""

    eps: float
    precision: Precision

    @nn.compact
    def __call__(self, images):
        make = lambda: whitening_filters(images.astype(self.precision.params), 3, self.eps)
        kernel = self.variable("frozen", "kernel", make).value
        self.sow("macs", "macs", images.shape[1] * images.shape[2] * kernel.size)
        return conv(images.astype(self.precision.activations), kernel, self.precision.operands)


class _GhostBatchNorm(nn.Module):
    """Statistics are computed and kept in the dtype of the weights, float32 at least."""

    config: Norm
    precision: Precision
    axis_name: str | None = None  # of the devices that a training batch is split over

    @nn.compact
    def __call__(self, x, train):
        config, (batch, height, width, channels) = self.config, x.shape
        groups, dtype = config.num_groups, self.precision.params
        ones = lambda: jnp.ones(channels, dtype)
        if config.train_scale:
            scale = self.param("scale", lambda _: ones())
        else:
            scale = self.variable("frozen", "scale", ones).value
        bias = self.param("bias", nn.initializers.zeros, (channels,), dtype)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (groups, channels), dtype)
        running_var = self.variable("batch_stats", "var", jnp.ones, (groups, channels), dtype)

        if not train:
            merge = (lambda s: s[0]) if config.faithful else (lambda s: s.mean(0))
            mean, var = merge(running_mean.value), merge(running_var.value)
            weight = scale / jnp.sqrt(var + config.eps)
            y = (x.astype(dtype) - _over_maps(mean)) * _over_maps(weight) + _over_maps(bias)
            return y.astype(x.dtype)

        groups, over = groups_here(groups, self.axis_name)
        if batch % groups:
            raise ValueError(f"a batch of {batch} images is not {groups} equal ghost groups; change batch_size")
        y, mean, var = normalize_groups(x, scale, bias, groups, config.eps, over)
        size = batch // groups * height * width * (1 if over is None else jax.lax.axis_size(over))
        keep, unbiased = config.momentum, size / max(size - 1, 1)
        running_mean.value = keep * running_mean.value + (1 - keep) * mean
        running_var.value = keep * running_var.value + (1 - keep) * unbiased * var
        return y


class _Block(nn.Module):
    """Convolution, norm and activation, with a 2x2 max-pool among them if asked for."""

    config: ResNet9
    features: int
    precision: Precision
    size: int = 3
    pool: bool = False
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train):
        order = self.config.pool_order if self.pool else "conv_norm_act"
        for layer in order.split("_"):
            if layer == "conv":
                x = _Conv(self.features, self.size, self.precision, name="conv")(x)
            elif layer == "norm":
                x = _GhostBatchNorm(self.config.norm, self.precision, self.axis_name, name="norm")(x, train)
            elif layer == "act":
                x = self.config.activation(x)
            else:
                x = max_pool(x, (2, 2))
        return x


class _Layer(nn.Module):
    """A pooling block, then the residual pair and the extra block if the layer has them."""

    config: ResNet9
    features: int
    precision: Precision
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train):
        block = lambda name, pool=False: _Block(
            self.config, self.features, self.precision, pool=pool, axis_name=self.axis_name, name=name
        )
        x = block("block", pool=True)(x, train)
        if self.name in self.config.res_layers:
            x = x + block("res2")(block("res1")(x, train), train)  # no activation after the sum
        if self.name in self.config.extra_layers:
            x = block("extra")(x, train)
        return x


class _ResNet9(nn.Module):
    config: ResNet9
    num_classes: int
    precision: Precision
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images, train):
        config, precision, axis_name = self.config, self.precision, self.axis_name
        if config.whiten:
            x = _Whiten(config.whiten_eps, precision, name="whiten")(images)
        else:
            x = images.astype(precision.activations)
        prep_size = 1 if config.whiten else 3
        x = _Block(config, config.channels[0], precision, size=prep_size, axis_name=axis_name, name="prep")(x, train)
        for i, features in enumerate(config.channels[1:], start=1):
            x = _Layer(config, features, precision, axis_name, name=f"layer{i}")(x, train)
        x = max_pool(x, x.shape[1:3]).reshape(len(x), -1)  # 4x4 for images of 32x32
        kernel = self.param("linear", _torch_uniform, (x.shape[-1], self.num_classes), precision.params)
        self.sow("macs", "linear", kernel.size)
        operands = (x.astype(precision.operands), kernel.astype(precision.operands))
        logits = jnp.dot(*operands, preferred_element_type=precision.activations)
        return logits.astype(precision.params) * config.output_scale
