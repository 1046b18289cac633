"""What the plots show, as arrays and groups of records."""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fastcifar_jax.analysis.compare import Arm, arm_name, num_epochs
from fastcifar_jax.augment import augment, normalize, plan_epoch
from fastcifar_jax.models.whitening import patch_moments
from fastcifar_jax.recipe import Recipe, flatten
from fastcifar_jax.report.tables import MAX_VALUE, arms_of, plausible
from fastcifar_jax.report.text import data_text
from fastcifar_jax.runs import records
from fastcifar_jax.runs.provenance import data_key
from fastcifar_jax.runs.records import Record
from fastcifar_jax.schedules import count_steps
from fastcifar_jax.train import train_epochs
from fastcifar_jax.types import Dataset, EpochInfo, flatten_by_path

Points = list[tuple[float, float]]


def to_pixels(images: np.ndarray, recipe: Recipe) -> np.ndarray:
    """Normalised images as uint8, clipped to 0 and 255."""
    return np.rint(np.clip(np.asarray(images) * recipe.std + recipe.mean, 0, 255)).astype(np.uint8)


def augmented(recipe: Recipe, dataset: Dataset, num_images: int, epochs: Sequence[int], seed: int = 0) -> np.ndarray:
    """The first training images as a run of the recipe sees them.

    Args:
      recipe: its augmentations and their sampling.
      dataset: all of it, since the augmentations are sampled for whole epochs.
      num_images: number of images.
      epochs: 1-based.
      seed: of the run.

    Returns:
      uint8 `[epochs, images, height, width, channels]`.
    """
    _, key = jax.random.split(jax.random.key(seed))
    images = normalize(jnp.asarray(dataset.train_images[:num_images]), recipe.mean, recipe.std)

    def of_epoch(epoch):
        shape = dataset.train_images.shape[:3]
        plan = plan_epoch(key, jnp.int32(epoch), recipe.sampling, recipe.augmentations, *shape)
        return augment(images, recipe.augmentations, tuple(choice[:num_images] for choice in plan.choices))

    return np.stack([to_pixels(of_epoch(epoch), recipe) for epoch in epochs])


class EigenPatches(NamedTuple):
    """Eigenvectors of the patches' second moments, by decreasing eigenvalue; their signs are arbitrary."""

    roots: np.ndarray  # of the eigenvalues, [patches]
    vectors: np.ndarray  # of length 1, in normalised units, [patches, size, size, channels]


def eigen_patches(recipe: Recipe, dataset: Dataset, size: int) -> EigenPatches:
    """The basis of the whitening filters, from the training images that the recipe's network is initialised with."""
    images = normalize(jnp.asarray(dataset.train_images[: recipe.init_images]), recipe.mean, recipe.std)
    eigenvalues, vectors = np.linalg.eigh(np.asarray(patch_moments(images, size), np.float64))
    roots = np.sqrt(np.maximum(eigenvalues[::-1], 0))
    return EigenPatches(roots, vectors.T[::-1].reshape(-1, size, size, images.shape[-1]))


class Rates(NamedTuple):
    """The learning rate over a run."""

    epochs: np.ndarray  # time, [steps + 1]
    rates: np.ndarray  # [steps + 1]
    optimizer: str  # its class; the rates of different optimisers cannot be compared


def learning_rates(recipe: Recipe, steps_per_epoch: int) -> Rates:
    """The recipe's peak rate times its schedule, at every step of a run.

    Raises:
      ValueError: an optimiser without a field `schedule`, or with neither `peak_lr` nor `lr`.
    """
    optim, num_steps = recipe.optim, count_steps(recipe.num_epochs, steps_per_epoch)
    peak, schedule = getattr(optim, "peak_lr", getattr(optim, "lr", None)), getattr(optim, "schedule", None)
    if peak is None or schedule is None:
        raise ValueError(
            f"{recipe.name}: {type(optim).__name__} has no field `schedule`, or neither `peak_lr` nor `lr`; the "
            "plot of the learning rate needs these fields"
        )
    steps = np.arange(num_steps + 1, dtype=np.float32)
    epochs = steps / steps_per_epoch
    in_steps = getattr(schedule, "IN_STEPS", False)
    share = schedule(num_steps)(jnp.asarray(steps)) if in_steps else schedule(recipe.num_epochs)(jnp.asarray(epochs))
    return Rates(epochs, peak * np.asarray(share), type(optim).__name__)


class NormHistory(NamedTuple):
    """Trained scales and biases of the batch norms at the end of each epoch: layer -> `[epochs, channels]`."""

    scales: dict[str, np.ndarray]  # empty if the scales are fixed
    biases: dict[str, np.ndarray]


def norm_history(
    recipe: Recipe, num_classes: int, dataset: Dataset, on_epoch: Callable[[EpochInfo], None], seed: int = 0
) -> NormHistory:
    """Trains a recipe and collects its batch norms, the layers with running statistics (section 7.6).

    Args:
      recipe: what to train.
      num_classes: size of the logits.
      dataset: on the device.
      on_epoch: called after each epoch.
      seed: of the run.

    Raises:
      ValueError: no batch norm, or a recipe that does not fit the data.
      Diverged: a loss that is not finite.
    """
    images = jax.ShapeDtypeStruct((1, *dataset.train_images.shape[1:]), jnp.float32)
    model = recipe.model(num_classes, "float32")  # the paths do not depend on the dtype
    variables = jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)), images)
    layers = {path.rpartition("/")[0] for path in flatten_by_path(variables["batch_stats"])}
    matches = [re.fullmatch("(.*)/(scale|bias)", path) for path in flatten_by_path(variables["params"])]
    history: dict[str, list[np.ndarray]] = {match[0]: [] for match in matches if match and match[1] in layers}
    if not history:
        raise ValueError(f"{recipe.name}: its network has no batch norm with a trained scale or bias")

    for snapshot in train_epochs(recipe, num_classes, jax.random.key(seed), dataset):
        arrays = flatten_by_path(snapshot.state.params)
        for path, rows in history.items():
            rows.append(np.array(arrays[path]))  # a copy: the next epoch overwrites the state
        on_epoch(snapshot.epochs[-1])
    of = lambda end: {path.removesuffix(end): np.stack(rows) for path, rows in history.items() if path.endswith(end)}
    return NormHistory(of("/scale"), of("/bias"))


def read_arms(paths: Sequence[Path]) -> list[Arm]:
    """The arms of the records in files and folders: `runs`, `runs/final` or `runs/final/....json`.

    Raises:
      ValueError: runs on different data, or no finished run.
      RecordError: a path without records, or a JSON file that is not a record.
    """
    found = list(records.gather(paths).values())
    data: dict[tuple, str] = {}
    for record in found:
        made = record.provenance
        data.setdefault(data_key(made), f"{record.experiment} on {data_text(made.data)}")
    if len(data) > 1:
        raise ValueError(f"these runs saw different images: {'; '.join(data.values())}; name runs on the same data")
    if not any(record.status == "finished" for record in found):
        raise ValueError(f"no run in {', '.join(map(str, paths))} has finished; there is nothing to draw")
    return arms_of(found)


def lengths_of(arms: Iterable[Arm]) -> dict[str, dict[float, Arm]]:
    """Recipes that differ only in their length: name -> epochs -> arm.

    Their schedules may differ too, since they depend on the length. The name is the common prefix of the experiments'
    names without a number at the end: `final_e24` and `final_e40` are `final`.

    Raises:
      ValueError: two recipes of the same length that differ only in their schedules.
    """
    alike: dict[str, dict[float, Arm]] = {}
    for arm in arms:
        first = arm.records[0]
        values = sorted(flatten(first.recipe).items())
        fixed = [(k, v) for k, v in values if k != "num_epochs" and not k.startswith("optim.schedule")]
        lengths = alike.setdefault(repr((first.framework, fixed)), {})
        epochs = num_epochs(first)
        if epochs in lengths:
            raise ValueError(
                f"{lengths[epochs].name} and {arm.name} both have {epochs:g} epochs and differ only in their "
                "schedules; name the records of one of them"
            )
        lengths[epochs] = arm
    named: dict[str, dict[float, Arm]] = {}
    for lengths in alike.values():
        firsts = [arm.records[0] for arm in lengths.values()]
        names = [re.sub(r"_?e?\d+$", "", arm_name(first.framework, first.experiment)) for first in firsts]
        name = os.path.commonprefix(names) or next(iter(lengths.values())).name
        name = f"{name}@{firsts[0].recipe_hash[:8]}" if name in named else name
        named[name] = dict(sorted(lengths.items()))
    return named


class Curves(NamedTuple):
    """One quantity of an arm by epoch."""

    mean: Points  # over the finished runs, at the epochs that all of them have
    finished: list[Points]  # one per run
    unfinished: list[Points]


def curves_of(arm: Arm, field: str) -> Curves:
    """The values of `EpochInfo.field` that can be drawn: accuracies in per cent, losses above 0."""
    scale, least = (100, 0) if field.endswith("accuracy") else (1, 1 / MAX_VALUE)

    def points(record: Record) -> Points:
        rows = [(row.epoch, scale * y) for row in record.epochs if (y := getattr(row, field)) is not None]
        return [(epoch, y) for epoch, y in rows if plausible(epoch) and plausible(y) and y >= least]

    runs = [(record.status == "finished", points(record)) for record in arm.records]
    finished = [found for done, found in runs if done and found]
    by_epoch = [dict(found) for found in finished]
    common = [epoch for epoch in by_epoch[0] if all(epoch in run for run in by_epoch)] if by_epoch else []
    mean = [(epoch, float(np.mean([run[epoch] for run in by_epoch]))) for epoch in common]
    return Curves(mean, finished, [found for done, found in runs if found and not done])
