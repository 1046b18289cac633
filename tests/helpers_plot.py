"""A network with a batch norm that is a plain pair of functions."""

NORMED = '''"""A convolution, a batch norm, an activation and a linear head."""

import dataclasses

import jax
import jax.numpy as jnp

from fastcifar_jax.evaluate import NoTTA
from fastcifar_jax.models.base import Model
from fastcifar_jax.optim import Nesterov
from fastcifar_jax.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Net:
    width: int = 4

    def with_width(self, width):
        return dataclasses.replace(self, width=width)

    def __call__(self, num_classes, compute_dtype):
        n = self.width

        def init(key, images):
            norm = {"scale": jnp.ones(n), "bias": jnp.zeros(n)}
            params = {
                "layer1": {"kernel": jax.random.normal(key, (3, n)), "norm": norm},
                "head": jax.random.normal(key, (n, num_classes)),
            }
            return {"params": params, "constants": {}, "batch_stats": {"layer1": {"norm": {"mean": jnp.zeros((1, n))}}}}

        def apply(variables, images, train):
            params, stats = variables["params"]["layer1"], variables["batch_stats"]
            row = lambda a: a.reshape(1, 1, 1, -1)
            x = images @ params["kernel"]
            mean = x.mean((0, 1, 2)) if train else stats["layer1"]["norm"]["mean"][0]
            variance = jnp.square(x - row(mean)).mean((0, 1, 2))
            x = (x - row(mean)) / jnp.sqrt(row(variance) + 1e-5)
            x = jnp.tanh(x * row(params["norm"]["scale"]) + row(params["norm"]["bias"])).mean((1, 2))
            return x @ variables["params"]["head"], {"layer1": {"norm": {"mean": mean[None]}}}

        return Model(init, apply, lambda stats: stats, lambda variables, images: {})


RECIPE = Recipe(
    name="normed", num_epochs=3, batch_size=16, augmentations=(), model=Net(), optim=Nesterov(peak_lr=0.1), tta=NoTTA()
)
'''
