"""A small network with a batch norm, as the file of a user."""

NORMED = '''"""A linear layer per pixel, a batch norm, and a linear head."""

import dataclasses

import flax.linen as nn

from fastcifar_jax.evaluate import NoTTA
from fastcifar_jax.models.layers import BatchNormConfig, linen_model
from fastcifar_jax.optim import Nesterov
from fastcifar_jax.recipe import Recipe


class Module(nn.Module):
    width: int
    num_classes: int

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(not train, name="norm")(nn.Dense(self.width)(x))
        return nn.Dense(self.num_classes)(nn.tanh(x).mean((1, 2)))


@dataclasses.dataclass(frozen=True)
class Net:
    width: int = 4

    def with_width(self, width):
        return dataclasses.replace(self, width=width)

    def __call__(self, num_classes, compute_dtype):
        return linen_model(Module(self.width, num_classes), BatchNormConfig())


RECIPE = Recipe(
    name="normed", num_epochs=3, batch_size=16, augmentations=(), model=Net(), optim=Nesterov(peak_lr=0.1), tta=NoTTA()
)
'''
