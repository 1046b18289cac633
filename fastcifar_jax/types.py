"""The arrays of a run as NamedTuples, and the array types of the public signatures."""

from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int, UInt8

Images = Float[Array, "batch height width channels"]  # normalised: (pixel - mean) / std
Pixels = UInt8[Array, "batch height width channels"]  # 0..255
Labels = Int[Array, " batch"]
Logits = Float[Array, "batch classes"]
Params = dict[str, Any]  # nested dicts of arrays


class Dataset(NamedTuple):
    """Both splits of a data set: NumPy arrays on the host or JAX arrays on the device."""

    train_images: Pixels
    train_labels: Labels
    test_images: Pixels
    test_labels: Labels


class Batch(NamedTuple):
    """Input of one training step: augmented, normalised images and their labels."""

    images: Images
    labels: Labels


class TrainState(NamedTuple):
    """Everything that a training step passes on to the next one: arrays only."""

    step: Int[Array, ""]  # steps taken so far
    params: Params  # trained
    constants: Params  # never trained: whitening filters, fixed batch norm scales
    batch_stats: Params  # running statistics of the batch norms
    opt_state: Any  # of the optax transformation
    average: Any  # of the recipe's average; () without one


class StepInfo(NamedTuple):
    """Sums over one training batch, measured in the forward pass that was differentiated."""

    loss: Float[Array, ""]
    correct: Int[Array, ""]


class Evaluation(NamedTuple):
    """Sums over the test set, of the plain images and, if computed, with test-time augmentation."""

    test_loss: Float[Array, ""]
    test_correct: Int[Array, ""]
    tta_loss: Float[Array, ""] | None
    tta_correct: Int[Array, ""] | None


class EpochInfo(NamedTuple):
    """One row of the epoch table, as Python numbers: means over the images, accuracies as fractions."""

    epoch: int  # 1-based
    train_seconds: float  # of this epoch alone
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    tta_loss: float | None  # with test-time augmentation; None where it was left out, see `compile_run`
    tta_accuracy: float | None


class Snapshot(NamedTuple):
    """A run at the end of an epoch, from which it can be resumed."""

    state: TrainState
    epochs: tuple[EpochInfo, ...]  # the rows so far
    setup_seconds: float  # whitening and initialisation


class RunResult(NamedTuple):
    """A finished run."""

    state: TrainState | None  # None if another process trained it
    epochs: tuple[EpochInfo, ...]
    setup_seconds: float  # whitening and initialisation
    compile_seconds: float  # 0.0 if an earlier run of the same program compiled it
    images_per_second: float  # training images over the seconds of the epochs

    @property
    def train_seconds(self) -> float:
        """Seconds of the set-up and all epochs, without compiling and evaluating (section 3.6 of the specification)."""
        return self.setup_seconds + sum(epoch.train_seconds for epoch in self.epochs)


def flatten_by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their paths, in the tree's order: `{"layer1/conv/kernel": ...}`.

    Raises:
      ValueError: two leaves have the same path, because names contain a slash.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(named) < len(leaves):
        raise ValueError("two arrays of the network have the same path; do not use / in names")
    return named
