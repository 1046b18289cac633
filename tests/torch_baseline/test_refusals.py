"""What the PyTorch baseline refuses to train."""

import dataclasses
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bag_of_tricks import final
from fastcifar_jax.augment import Crop
from fastcifar_jax.muon import Muon
from tests.helpers_train import DATASET, small

pytest.importorskip("torch", reason='needs PyTorch: pip install -e ".[compare]"')

from fastcifar_jax.torch_baseline.train import train_epochs


@dataclasses.dataclass(frozen=True)
class Invert:
    """An augmentation of a fork."""

    def options(self, height, width):
        return np.array([True, False])

    def __call__(self, image, option):
        return jnp.where(option, -image, image)


@dataclasses.dataclass(frozen=True)
class Focal:
    """A loss of a fork."""

    label_smoothing: float = 0.0

    def __call__(self, logits, labels):
        return jnp.zeros(len(labels))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"augmentations": (Crop(4), Invert())},
            r"augmentations Invert\(\); the PyTorch baseline has Crop, Flip, AlternatingFlip, Cutout",
        ),
        (
            {"loss": Focal()},
            r"loss Focal\(label_smoothing=0.0\); the PyTorch baseline has CrossEntropy: train it with JAX",
        ),
        ({"batch_size": 100}, "a batch of 100 images is not 16 equal ghost groups; change batch_size"),
        (
            {"optim": Muon(), "model": replace(final.model, norm=replace(final.model.norm, train_scale=True))},
            "Muon cannot train the scales of norms; set model.norm.train_scale to False",
        ),
    ],
)
def test_refuses_what_it_does_not_have(changes, message):
    with pytest.raises(ValueError, match=message):
        next(train_epochs(replace(final, **changes), 10, 0, DATASET))


def test_refuses_data_that_do_not_fit():
    with pytest.raises(ValueError, match="batch_size 512 is larger than the 112 training images; set it lower"):
        next(train_epochs(replace(final, compute_dtype="float32"), 4, 0, DATASET))
    with pytest.raises(ValueError, match="Crop pads by 16 pixels"):
        next(train_epochs(small(final, augmentations=(Crop(16),)), 4, 0, DATASET))
