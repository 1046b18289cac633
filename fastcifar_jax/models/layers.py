"""The layers that the networks share."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from fastcifar_jax.models.base import LayerInfo, Model, Precision, Variables
from fastcifar_jax.ops.batch_norm import normalize, normalize_groups, normalize_groups_and_pool
from fastcifar_jax.ops.conv import conv
from fastcifar_jax.ops.max_pool import max_pool
from fastcifar_jax.types import Images, Logits, flatten_by_path


@dataclasses.dataclass(frozen=True)
class BatchNormConfig:
    """Batch norm over ghost groups of a batch (sections 1.3 to 1.5 of the specification).

    Attributes:
      num_groups: ghost groups per batch; image n belongs to group `n % num_groups`. 1 is ordinary batch norm.
      train_scale: False fixes the scales at 1, outside the trained parameters.
      momentum: fraction of the running statistics that a step keeps (1 minus PyTorch's momentum).
      eps: added to the variance.
      eval_first_group: evaluate with the running statistics of group 0, as the original does under an EMA, instead of
        their mean over the groups.
    """

    num_groups: int = 1
    train_scale: bool = True
    momentum: float = 0.9
    eps: float = 1e-5
    eval_first_group: bool = False

    def __post_init__(self):
        if self.num_groups < 1 or not 0 <= self.momentum < 1 or not self.eps > 0:
            raise ValueError(
                f"BatchNormConfig has num_groups {self.num_groups}, momentum {self.momentum}, eps {self.eps}; "
                "expected num_groups >= 1, 0 <= momentum < 1, eps > 0"
            )


def linen_model(net: nn.Module, norm: BatchNormConfig) -> Model:
    """The functions of a Linen module that is called with `(images, train)`.

    Args:
      net: keeps its arrays in the collections "params", "constants" and "batch_stats", and sows multiply-accumulates
        in "macs".
      norm: the configuration of its batch norms.
    """

    def init(key, images):
        variables = net.init(key, images, train=False)  # so that any number of images will do
        return {name: variables.get(name, {}) for name in ("params", "constants", "batch_stats")}

    def apply(variables, images, train):
        if not train:
            return net.apply(variables, images, train=False), variables["batch_stats"]
        logits, updated = net.apply(variables, images, train=True, mutable=["batch_stats"])
        return logits, updated["batch_stats"]

    def finalize_batch_stats(batch_stats):
        # Without `eval_first_group`, evaluation takes the mean over groups. It is linear, as the running averages are,
        # so writing it back would not change later evaluations.
        merge = lambda statistics: jnp.broadcast_to(statistics.mean(0, keepdims=True), statistics.shape)
        return jax.tree.map(merge, batch_stats) if norm.eval_first_group else batch_stats

    def macs(variables, images):
        found = {}

        def trace(variables, images):
            found.update(net.apply(variables, images[:1], train=False, mutable=["macs"])[1]["macs"])

        jax.eval_shape(trace, variables, images)
        return found

    return Model(init, apply, finalize_batch_stats, macs, norm.num_groups, functools.partial(_layers_of, net))


def _layers_of(net: nn.Module, variables: Variables, images: Images | jax.ShapeDtypeStruct) -> list[LayerInfo]:
    """The calls of modules as `Model.layers` lists them; arrays of a module with layers inside are layers, too."""
    calls: dict[tuple[str, ...], Any] = {}

    def intercept(call, args, kwargs, context):
        listed = context.method_name == "__call__"
        if listed:
            calls.setdefault(context.module.path)  # before the layers inside it
        result = call(*args, **kwargs)
        if listed:
            calls[context.module.path] = (context.module, result.shape[1:])
        return result

    with nn.intercept_methods(intercept):
        jax.eval_shape(lambda variables, images: net.apply(variables, images[:1], train=False), variables, images)
    flat = (flatten_by_path(variables[name]) for name in ("params", "constants"))
    arrays = [{tuple(path.split("/")): array for path, array in found.items()} for found in flat]
    count = lambda path: (sum(a.size for key, a in found.items() if key[: len(path)] == path) for found in arrays)
    rows = []
    for path, (module, shape) in calls.items():
        kernel = next((found[*path, "kernel"] for found in arrays if (*path, "kernel") in found), None)
        rows.append(LayerInfo(path, type(module).__name__.lstrip("_"), _detail(module, kernel), shape, *count(path)))
    for path in (path for found in arrays for path in found):
        inside = [i for i, row in enumerate(rows) if row.path[: len(path) - 1] == path[:-1]]
        if len(inside) > 1:
            rows.insert(inside[-1] + 1, LayerInfo(path, path[-1], "", calls[path[:-1]][1], *count(path)))
    return rows


def _detail(module: nn.Module, kernel: Array | None) -> str:
    """Size of the kernel or of the pooling window, or the function."""
    if function := getattr(module, "function", None):
        return repr(function) if dataclasses.is_dataclass(function) else getattr(function, "__name__", "")
    window = getattr(module, "pool", None)
    size = kernel.shape[:-2] if kernel is not None else window if isinstance(window, tuple) else ()
    return f"{'pool ' * isinstance(module, GhostBatchNorm) if size else ''}{'×'.join(map(str, size))}"


def torch_uniform(key, shape, dtype):
    """PyTorch's default, U(-1/sqrt(fan_in), 1/sqrt(fan_in)); flax's own default is sqrt(3) wider."""
    return nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")(key, shape, dtype)


def dirac(key: PRNGKeyArray, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """PyTorch's default, but filter i < inputs copies channel i (airbench.md, section 3)."""
    height, width, inputs, _ = shape
    kernel = torch_uniform(key, shape, dtype)
    same = min(inputs, shape[3])
    identity = jnp.zeros((height, width, inputs, same), dtype).at[height // 2, width // 2].set(jnp.eye(inputs, same))
    return kernel.at[..., :same].set(identity)


class Conv(nn.Module):
    """A convolution without bias, padded to the size of its input.

    Attributes:
      features: output channels.
      size: height and width of the kernel.
      precision: of weights and operands.
      kernel_init: Linen initialiser of HWIO kernels.
      pool: size of the windows of a max-pool that follows directly; see `ops.conv`.
    """

    features: int
    size: int
    precision: Precision
    kernel_init: Callable[..., Array] = torch_uniform
    pool: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, x):
        """Maps in the dtype of `x`."""
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.precision.params)
        y = conv(x, kernel, self.precision.operands, pool=self.pool)
        self.sow("macs", "macs", y.shape[1] * y.shape[2] * kernel.size)
        return y


class Activation(nn.Module):
    """An elementwise function; a module, as the next two, so that `Model.layers` lists it."""

    function: Callable[[Array], Array]

    def __call__(self, x):
        """Maps of the same shape."""
        return self.function(x)


class MaxPool(nn.Module):
    """A max-pool."""

    pool: tuple[int, int] = (2, 2)

    def __call__(self, x):
        """Maps, smaller by the window."""
        return max_pool(x, self.pool)


class Add(nn.Module):
    """The sum of a residual."""

    def __call__(self, x, y):
        """Maps of the same shape."""
        return x + y


class GhostBatchNorm(nn.Module):
    """Batch norm, and a max-pool after it if asked for; statistics have the dtype of the weights, at least float32.

    Attributes:
      config: of the norm.
      precision: of weights and maps.
      pool: size of the windows of a max-pool that follows, or None.
    """

    config: BatchNormConfig
    precision: Precision
    pool: tuple[int, int] | None = None

    @nn.compact
    def __call__(self, x, train):
        """Normalised maps in the dtype of `x`."""
        config, (batch, height, width, channels) = self.config, x.shape
        groups, dtype = config.num_groups, self.precision.params
        if config.train_scale:
            scale = self.param("scale", nn.initializers.ones, (channels,), dtype)
        else:
            scale = self.variable("constants", "scale", jnp.ones, (channels,), dtype).value
        bias = self.param("bias", nn.initializers.zeros, (channels,), dtype)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (groups, channels), dtype)
        running_var = self.variable("batch_stats", "var", jnp.ones, (groups, channels), dtype)

        if not train:
            merge = (lambda s: s[0]) if config.eval_first_group else (lambda s: s.mean(0))
            y = normalize(x, scale, bias, merge(running_mean.value), merge(running_var.value), config.eps)
            return max_pool(y, self.pool) if self.pool else y

        if batch % groups:
            raise ValueError(f"a batch of {batch} images is not {groups} equal ghost groups; change batch_size")
        if self.pool and height % self.pool[0] == 0 and width % self.pool[1] == 0:
            y, mean, var = normalize_groups_and_pool(x, scale, bias, running_mean.value, groups, config.eps, self.pool)
        else:
            y, mean, var = normalize_groups(x, scale, bias, running_mean.value, groups, config.eps)
            y = max_pool(y, self.pool) if self.pool else y
        size = batch // groups * height * width
        keep, unbiased = config.momentum, size / max(size - 1, 1)
        running_mean.value = keep * running_mean.value + (1 - keep) * mean
        running_var.value = keep * running_var.value + (1 - keep) * unbiased * var
        return y


def linear_head(
    module: nn.Module, x: Images, num_classes: int, precision: Precision, init: Callable[..., Array] = torch_uniform
) -> Logits:
    """The maximum of each map times a matrix, the parameter "linear" of `module`; logits have the matrix's dtype."""
    x = max_pool(x, x.shape[1:3]).reshape(len(x), -1)
    kernel = module.param("linear", init, (x.shape[-1], num_classes), precision.params)
    module.sow("macs", "linear", kernel.size)
    operands = (x.astype(precision.operands), kernel.astype(precision.operands))
    return jnp.dot(*operands, preferred_element_type=precision.params)
