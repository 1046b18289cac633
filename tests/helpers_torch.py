"""Weights of the PyTorch twins, under the names that the package gives them.

Import this after `pytest.importorskip("torch")`.
"""

import numpy as np
import torch

CPU = torch.device("cpu")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def path_of(name: str) -> str:
    """ "layers.0.bn.weight" -> "layer1/block/norm/scale", the package's name."""
    for i in range(3):
        name = name.replace(f"layers.{i}.", f"layer{i + 1}.block.").replace(f".{i}.", f".res{i + 1}.")
    name = name.removeprefix("residuals.").replace("bn.weight", "norm.scale").replace("bn.", "norm.")
    return name.replace("linear.weight", "linear").replace("weight", "kernel").replace(".", "/")


def merged(flat: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """With the mean of the groups' running statistics, which is what evaluation uses."""
    return {path: x.mean(0) if path.endswith(("mean", "var")) else x for path, x in flat.items()}


def assert_same(ours, theirs, rtol, atol):
    assert set(ours) == set(theirs)
    for path in theirs:
        np.testing.assert_allclose(ours[path], theirs[path], rtol, atol, err_msg=path)
