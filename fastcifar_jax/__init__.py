"""The CIFAR-10 bag of tricks as pure JAX functions.

Public names are imported on first use (PEP 562), so that `import fastcifar_jax` does not import JAX.
"""

# ruff: noqa: F401

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the same names as in `_MODULES`, for type checkers and editors
    from fastcifar_jax.analysis.compare import CompareOptions, compare
    from fastcifar_jax.augment import AlternatingFlip, Crop, Cutout, Flip, GroupedSampling, IndependentSampling
    from fastcifar_jax.averaging import Ema, Lookahead
    from fastcifar_jax.data.load import load_data
    from fastcifar_jax.evaluate import FlipTTA, NoTTA, SixViewTTA
    from fastcifar_jax.losses import CrossEntropy
    from fastcifar_jax.models.activations import Celu, Gelu, Relu
    from fastcifar_jax.models.airnet import AirNet
    from fastcifar_jax.models.layers import BatchNormConfig
    from fastcifar_jax.models.resnet9 import ResNet9
    from fastcifar_jax.muon import Muon
    from fastcifar_jax.optim import AirbenchSGD, Nesterov
    from fastcifar_jax.recipe import Published, Recipe, difference, flatten, from_dict, override, to_dict
    from fastcifar_jax.runs.saved_model import SavedModel, load_model
    from fastcifar_jax.runs.saved_model import load_model as load
    from fastcifar_jax.schedules import Triangle, WarmupDecay
    from fastcifar_jax.train import make_train, train_epochs

__version__ = "0.1.0"

_MODULES = {
    "analysis.compare": "CompareOptions compare",
    "augment": "AlternatingFlip Crop Cutout Flip GroupedSampling IndependentSampling",
    "averaging": "Ema Lookahead",
    "data.load": "load_data",
    "evaluate": "FlipTTA NoTTA SixViewTTA",
    "losses": "CrossEntropy",
    "models.activations": "Celu Gelu Relu",
    "models.airnet": "AirNet",
    "models.layers": "BatchNormConfig",
    "models.resnet9": "ResNet9",
    "muon": "Muon",
    "optim": "AirbenchSGD Nesterov",
    "recipe": "Published Recipe difference flatten from_dict override to_dict",
    "runs.saved_model": "SavedModel load_model load=load_model",
    "schedules": "Triangle WarmupDecay",
    "train": "make_train train_epochs",
}
_HOMES = {
    public: (module, name or public)
    for module, names in _MODULES.items()
    for public, _, name in (text.partition("=") for text in names.split())
}
__all__ = list(_HOMES)


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)


def __dir__():
    return sorted({*globals(), *__all__})
