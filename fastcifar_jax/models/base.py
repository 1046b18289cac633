"""The interface of a network, a pair of pure functions, and the dtypes that it computes in."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from fastcifar_jax.types import Images, Logits, Params

Variables = dict[str, Params]  # the collections "params", "constants" and "batch_stats"


class Precision(NamedTuple):
    """The dtypes of a compute policy."""

    params: Any  # master copies of the weights
    activations: Any  # between the layers
    operands: Any  # of the convolutions and the head
    images: Any = jnp.float32  # normalised; bfloat16 would drop two bits of the pixels


PRECISIONS = {
    "float32": Precision(jnp.float32, jnp.float32, jnp.float32),
    "mixed": Precision(jnp.float32, jnp.float32, jnp.bfloat16),
    "bfloat16": Precision(jnp.float32, jnp.bfloat16, jnp.bfloat16),
    "float16": Precision(jnp.float32, jnp.float16, jnp.float16, jnp.float16),  # images as in the original
    "float64": Precision(jnp.float64, jnp.float64, jnp.float64, jnp.float64),  # needs jax_enable_x64; for comparisons
}


class LayerInfo(NamedTuple):
    """A layer of a network, as a drawing shows it."""

    path: tuple[str, ...]  # names of the modules that contain it, and its own
    type: str  # class of the module
    detail: str  # for example the size of the kernel
    shape: tuple[int, ...]  # of the output for one image
    trained: int  # parameters in it, with those of the layers inside it
    constants: int  # numbers in the collection "constants", likewise


class Model(NamedTuple):
    """A network: pure functions over plain nested dicts of arrays in three collections.

    Attributes:
      init: `(key, images) -> variables`; the images are normalised training images, from which whitening filters are
        computed.
      apply: `(variables, images, train) -> (logits, batch_stats)`; logits have the dtype of the weights.
      finalize_batch_stats: `batch_stats -> batch_stats`, called when the evaluated variables leave training mode;
        the identity for most networks.
      macs: `(variables, images) -> nested dict` of the multiply-accumulates per image of the forward pass, by layer;
        evaluates shapes only.
      num_groups: ghost groups per training batch, the first axis of every leaf of `batch_stats`; image n belongs to
        group `n % num_groups`.
      layers: `(variables, images) -> list[LayerInfo]` in the order of the calls, each before the layers inside it;
        evaluates shapes only. None for networks that cannot list their layers.
    """

    init: Callable[[PRNGKeyArray, Images], Variables]
    apply: Callable[[Variables, Images, bool], tuple[Logits, Params]]
    finalize_batch_stats: Callable[[Params], Params]
    macs: Callable[[Variables, Images | jax.ShapeDtypeStruct], dict[str, Any]]
    num_groups: int = 1
    layers: Callable[[Variables, Images | jax.ShapeDtypeStruct], list[LayerInfo]] | None = None


class Network(Protocol):
    """The type of `Recipe.model`: a frozen dataclass that builds a `Model` for a number of classes."""

    def __call__(self, num_classes: int, compute_dtype: str) -> Model:
        """The network's functions; `compute_dtype` is a key of `PRECISIONS`."""
        ...

    def with_width(self, width: int) -> "Network":
        """The same network, wider or narrower; the first layer gets `width` channels."""
        ...
