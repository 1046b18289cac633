"""What the two sides of a comparison share: inputs, initial weights and the shape of the result. NumPy alone.

Nothing here depends on JAX's or PyTorch's random numbers, so golden trajectories can be checked with either missing.
`RandomState` is used because its streams are frozen (NEP 19); those of `default_rng` may change between releases.

Weights travel as one flat dictionary, path -> array in the package's layout: "layer1/block/conv/kernel" (HWIO),
"layer1/block/norm/scale", "bias" [channels], "mean", "var" [groups, channels], "linear" [features, classes].
"""

import math
import zlib
from typing import NamedTuple

import numpy as np

NUM_CLASSES = 10


class Case(NamedTuple):
    """The size of one comparison."""

    num_steps: int
    steps_per_epoch: int
    num_epochs: float | None = None  # None: the recipe's own
    size: int = 16  # of the images; 8 is the smallest that three pools leave something of
    width: int = 4
    batch_size: int = 64  # 16 ghost groups of 4


# One step an epoch: at the recipes' own lengths, six steps then go past the peak of every schedule (5 of 25 epochs).
LADDER = Case(num_steps=6, steps_per_epoch=1)
# Three whole epochs. 7 is not a multiple of the average's 5: a counter that is not restarted with the epoch shows.
EPOCHS = Case(num_steps=21, steps_per_epoch=7, num_epochs=3, size=32)


# The whitening bias freezes after 15 of 20 steps, and the last epoch is a part of one.
AIRBENCH = Case(num_steps=20, steps_per_epoch=5, num_epochs=3.9)


class Trajectory(NamedTuple):
    """What a run leaves behind."""

    losses: list[float]  # summed over the batch, one a step
    correct: list[int]
    weights: dict[str, np.ndarray]  # trained, frozen and running statistics
    velocity: dict[str, np.ndarray]
    average: dict[str, np.ndarray]  # trained and running statistics; empty without one
    logits: np.ndarray  # evaluation mode, of `held_out`
    tta_logits: np.ndarray


def images_and_labels(num_images: int, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noisy 4x4 blocks, `[n, size, size, 3]` uint8, tinted by the label, so that there is something to learn.

    The blocks give the patches a spread of second moments, as images have; pure noise would not.
    """
    random = np.random.RandomState(seed)
    labels = random.randint(0, NUM_CLASSES, num_images)
    tints = np.random.RandomState(2000).randint(0, 80, (NUM_CLASSES, 3))
    blocks = random.randint(0, 120, (num_images, -(-size // 4), -(-size // 4), 3))
    pixels = blocks.repeat(4, axis=1).repeat(4, axis=2)[:, :size, :size] + tints[labels][:, None, None, :]
    return (pixels + random.randint(0, 56, pixels.shape)).astype(np.uint8), labels


def batches(case: Case) -> list[tuple[np.ndarray, np.ndarray]]:
    """One batch a step, no two alike."""
    return [images_and_labels(case.batch_size, case.size, seed=step) for step in range(case.num_steps)]


def held_out(case: Case) -> np.ndarray:
    """Images to predict after the run; their number is no multiple of the ghost groups."""
    return images_and_labels(25, case.size, seed=1000)[0]


def whitening_images() -> np.ndarray:
    """Images to whiten."""
    return images_and_labels(100, 16, seed=3000)[0]


def initial_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Float64 weights by path: PyTorch's default bounds for kernels, norms as they start.

    The whitening filters are drawn like any other kernel: an eigenvector's sign is the solver's choice, so computed
    ones would make the trajectory depend on the linear algebra library.
    """
    constants = {"scale": 1.0, "bias": 0.0, "mean": 0.0, "var": 1.0}

    def make(path, shape):
        kind = path.split("/")[-1]
        if kind in constants:
            return np.full(shape, constants[kind])
        bound = 1 / math.sqrt(math.prod(shape[:-1]))
        return np.random.RandomState(zlib.crc32(path.encode())).uniform(-bound, bound, shape)

    return {path: make(path, shape) for path, shape in shapes.items()}


def fingerprint(arrays: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """Kind ("kernel", "bias", ...) -> `[norm, projection]` over all arrays of that kind.

    The norm does not see the order of the elements, so swapped axes or ghost groups show in the projection: the
    product with a fixed vector, sin(1), sin(2), ...
    """
    kinds: dict[str, list[np.ndarray]] = {}
    for path in sorted(arrays):
        kinds.setdefault(path.split("/")[-1], []).append(arrays[path].astype(np.float64).ravel())
    joined = {kind: np.concatenate(parts) for kind, parts in kinds.items()}
    return {
        kind: [float(np.linalg.norm(x)), float(x @ np.sin(np.arange(1.0, x.size + 1)))] for kind, x in joined.items()
    }


def summary(trajectory: Trajectory) -> dict:
    """A trajectory in a few numbers, as JSON."""
    return {
        "losses": trajectory.losses,
        "correct": trajectory.correct,
        "weights": fingerprint(trajectory.weights),
        "velocity": fingerprint(trajectory.velocity),
        "average": fingerprint(trajectory.average),
        "logits": fingerprint({"plain": trajectory.logits, "tta": trajectory.tta_logits}),
    }
