"""What the plots show, as arrays and groups of records."""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fastcifar_jax.analysis.compare import Arm, arm_name
from fastcifar_jax.augment import augment, normalize, plan_epoch
from fastcifar_jax.models.whitening import patch_moments
from fastcifar_jax.recipe import Recipe
from fastcifar_jax.runs import records
from fastcifar_jax.runs.records import Record
from fastcifar_jax.schedules import count_steps
from fastcifar_jax.train import make_train
from fastcifar_jax.types import Dataset, EpochInfo, flatten_by_path


def to_pixels(images: np.ndarray, recipe: Recipe) -> np.ndarray:
    """Normalised images as uint8, cut off at 0 and 255."""
    return np.rint(np.clip(np.asarray(images) * recipe.std + recipe.mean, 0, 255)).astype(np.uint8)


def augmented(recipe: Recipe, dataset: Dataset, num_images: int, epochs: Sequence[int], seed: int = 0) -> np.ndarray:
    """The first training images as a run of the recipe sees them.

    Args:
      recipe: its augmentations and how they are drawn.
      dataset: all of it, since options are drawn for whole epochs.
      num_images: how many.
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
    """Eigenvectors of the patches' second moments, by falling eigenvalue; their signs are the solver's choice."""

    roots: np.ndarray  # of the eigenvalues, [patches]
    vectors: np.ndarray  # of length 1, in normalised units, [patches, size, size, channels]


def eigen_patches(recipe: Recipe, dataset: Dataset, size: int) -> EigenPatches:
    """What whitening filters are made of: from the training images that the recipe's network is initialised with."""
    images = normalize(jnp.asarray(dataset.train_images[: recipe.init_images]), recipe.mean, recipe.std)
    eigenvalues, vectors = np.linalg.eigh(np.asarray(patch_moments(images, size), np.float64))
    roots = np.sqrt(np.maximum(eigenvalues[::-1], 0))
    return EigenPatches(roots, vectors.T[::-1].reshape(-1, size, size, images.shape[-1]))


class Rates(NamedTuple):
    """The learning rate over a run."""

    epochs: np.ndarray  # time, [steps + 1]
    rates: np.ndarray  # [steps + 1]
    optimizer: str  # whose rate it is; the rates of different optimisers mean different things


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
            "learning rate is drawn from these"
        )
    steps = np.arange(num_steps + 1, dtype=np.float32)
    epochs = steps / steps_per_epoch
    in_steps = getattr(schedule, "IN_STEPS", False)
    share = schedule(num_steps)(jnp.asarray(steps)) if in_steps else schedule(recipe.num_epochs)(jnp.asarray(epochs))
    return Rates(epochs, peak * np.asarray(share), type(optim).__name__)


class NormHistory(NamedTuple):
    """Trained scales and biases of the batch norms at the end of each epoch: layer -> `[epochs, channels]`."""

    scales: dict[str, np.ndarray]  # empty where the scales are fixed
    biases: dict[str, np.ndarray]


def norm_history(
    recipe: Recipe,
    num_classes: int,
    dataset: Dataset,
    on_epoch: Callable[[EpochInfo], None] | None = None,
    seed: int = 0,
) -> NormHistory:
    """Trains a recipe and logs its batch norms, which are the layers that keep running statistics (section 7.6).

    Args:
      recipe: what to train.
      num_classes: size of the logits.
      dataset: on the device.
      on_epoch: is told of each epoch.
      seed: of the run.

    Raises:
      ValueError: no batch norm, or a recipe that does not fit the data.
      Diverged: a loss that is not finite.
    """
    images = jax.ShapeDtypeStruct((1, *dataset.train_images.shape[1:]), jnp.float32)
    model = recipe.model(num_classes, "float32")  # the dtype is of no consequence here
    variables = jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)), images)
    layers = {path.rpartition("/")[0] for path in flatten_by_path(variables["batch_stats"])}
    matches = [re.fullmatch("(.*)/(scale|bias)", path) for path in flatten_by_path(variables["params"])]
    history: dict[str, list[np.ndarray]] = {match[0]: [] for match in matches if match and match[1] in layers}
    if not history:
        raise ValueError(f"{recipe.name}: its network has no batch norm with a trained scale or bias")

    def keep(snapshot):
        arrays = flatten_by_path(snapshot.state.params)
        for path, rows in history.items():
            rows.append(np.array(arrays[path]))  # a copy: the next epoch overwrites the state

    make_train(recipe, num_classes)(jax.random.key(seed), dataset, on_epoch, on_snapshot=keep)
    of = lambda end: {path.removesuffix(end): np.stack(rows) for path, rows in history.items() if path.endswith(end)}
    return NormHistory(of("/scale"), of("/bias"))


def read_runs(paths: Iterable[Path]) -> list[Record]:
    """The records in files and folders: `runs`, `runs/final` or `runs/final/....json`.

    Raises:
      ValueError: runs on different images, or two records of one run.
      RecordError: a path that holds no record, or a JSON file that is none.
    """
    found = records.gather(paths)
    images: dict[str, str] = {}
    runs: dict[tuple, list[Path]] = {}
    for file, record in found.items():
        images.setdefault(
            record.provenance.data["hash"], f"{file.name} of {record.experiment} saw {record.provenance.data['source']}"
        )
        runs.setdefault((record.framework, record.experiment, record.recipe_hash, record.seed), []).append(file)
    if len(images) > 1:
        raise ValueError(f"these runs saw different images: {'; '.join(images.values())}; name those of one data set")
    if twice := [files for files in runs.values() if len(files) > 1]:
        raise ValueError(f"{' and '.join(map(str, twice[0]))} are records of one run; name one of them")
    return list(found.values())


def arms_of(runs: Iterable[Record]) -> list[Arm]:
    """The records by recipe, named as in `compare`; recipes that share a name are told apart by epochs, or by hash."""
    by_recipe: dict[tuple[str, str], list[Record]] = {}
    for record in runs:
        by_recipe.setdefault((_name(record), record.recipe_hash), []).append(record)
    arms, names = [], list(dict.fromkeys(name for name, _ in by_recipe))
    in_order = lambda item: (names.index(item[0][0]), _length(item[1][0]))
    for (name, recipe_hash), group in sorted(by_recipe.items(), key=in_order):
        others = [same[0] for (other, _), same in by_recipe.items() if other == name]
        if len({_length(record) for record in others}) < len(others):
            name = f"{name}@{recipe_hash[:8]}"
        elif len(others) > 1:
            name = f"{name}, {_length(group[0]):g} epochs"
        arms.append(Arm(name, tuple(sorted(group, key=lambda record: record.seed))))
    return arms


def lengths_of(arms: Iterable[Arm]) -> dict[str, dict[float, Arm]]:
    """Recipes that differ in nothing but their length: name -> epochs -> arm.

    A recipe's schedule may differ too: it is moved with the length. The name is what the arms' names have in common,
    without a number at its end: `final_e24` and `final_e40` are `final`.

    Raises:
      ValueError: two recipes of one length that differ only in their schedule.
    """
    alike: dict[str, dict[float, Arm]] = {}
    for arm in arms:
        first = arm.records[0]
        fixed = {k: v for k, v in first.recipe.items() if k != "num_epochs" and not k.startswith("optim.schedule")}
        lengths = alike.setdefault(repr((first.framework, sorted(fixed.items()))), {})
        epochs = _length(first)
        if epochs in lengths:
            raise ValueError(
                f"{lengths[epochs].name} and {arm.name} are both of {epochs:g} epochs and differ in nothing but their "
                "schedule; name the records of one of them"
            )
        lengths[epochs] = arm
    named = {}
    for lengths in alike.values():
        group = list(lengths.values())
        stem = os.path.commonprefix([re.sub(r"_?e?\d+$", "", _name(arm.records[0])) for arm in group])
        name = stem or group[0].name
        name = f"{name}@{group[0].records[0].recipe_hash[:8]}" if name in named else name
        named[name] = dict(sorted(lengths.items()))
    return named


def _name(record: Record) -> str:
    return arm_name(record.framework, record.experiment)


def _length(record: Record) -> float:
    """In epochs; a record may come from anywhere, and its recipe holds what it likes."""
    length = record.recipe.get("num_epochs")
    return length if isinstance(length, int | float) else len(record.epochs)
