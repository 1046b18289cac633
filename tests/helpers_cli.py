"""An experiment file that trains in no time, and runs that only pretend to train."""

import numpy as np

from fastcifar_jax.runs import runner
from fastcifar_jax.train import CompiledRun
from fastcifar_jax.types import Dataset, EpochInfo, Snapshot

TRICK = '''"""A linear network, which compiles in no time."""

import dataclasses

import jax.numpy as jnp

from fastcifar_jax.models.base import Model
from fastcifar_jax.optim import Nesterov
from fastcifar_jax.recipe import Published, Recipe


@dataclasses.dataclass(frozen=True)
class Linear:
    width: int = 3

    def with_width(self, width):
        return dataclasses.replace(self, width=width)

    def __call__(self, num_classes, compute_dtype):
        def init(key, images):
            return {"params": {"w": jnp.zeros((3, num_classes))}, "constants": {}, "batch_stats": {}}

        def apply(variables, images, train):
            return images.mean((1, 2)) @ variables["params"]["w"], {}

        return Model(init, apply, lambda stats: stats, lambda variables, images: {"w": 3 * num_classes})


RECIPE = Recipe(name="inherited", num_epochs=2, batch_size=64, model=Linear(), published=Published(0.9, 9, source="x"))
'''


def train_and_test(num_train=130, num_test=20):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (num_train + num_test, 32, 32, 3), np.uint8)
    labels = rng.integers(0, 10, num_train + num_test, np.int32)
    return Dataset(images[:num_train], labels[:num_train], images[num_train:], labels[num_train:])


def fake_train_epochs(accuracy, raises, trained):
    """A run of one epoch that takes no time, in place of `train.train_epochs`.

    Args:
      accuracy: of a recipe and a seed.
      raises: seed -> what its run raises at the end.
      trained: gets `(recipe name, seed)` of each run.
    """

    def train_epochs(recipe, num_classes, key, dataset, **options):
        seed = key if isinstance(key, int) else int(key._base_array[1])
        trained.append((recipe.name, seed))
        value = accuracy(recipe, seed)
        yield Snapshot(None, (EpochInfo(1, 8.0, 1.0, 0.5, 0.9, value, 0.8, value + 0.005),), 1.0)
        if seed in raises:
            raise raises[seed]

    return train_epochs


def pretend_to_train(monkeypatch, accuracy, raises, trained):
    """Gives the runner `fake_train_epochs` and nothing to compile."""
    compiled = CompiledRun(*[None] * 5, "epoch", 1, 30.0)
    monkeypatch.setattr(runner, "compile_run", lambda *args, **options: compiled)
    monkeypatch.setattr(runner, "train_epochs", fake_train_epochs(accuracy, raises, trained))
