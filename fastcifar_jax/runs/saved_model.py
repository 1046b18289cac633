"""Saved models: the weights that a finished run was evaluated with, in one safetensors file, and prediction with them.

Files are treated as untrusted. They hold arrays and JSON text; the network is built from this package's own classes,
each field checked against its type, and nothing in a file is executed. A part that is a user's own class cannot be
named by a file: it is taken from the recipe that the caller gives.
"""

import contextlib
import dataclasses
import functools
import json
import os
import typing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jaxtyping import Float
from scipy.special import softmax

from fastcifar_jax import __version__
from fastcifar_jax.augment import normalize
from fastcifar_jax.data.load import DataInfo, hash_of
from fastcifar_jax.evaluate import CHUNK, TTA, in_chunks
from fastcifar_jax.models.base import PRECISIONS, Network, Variables
from fastcifar_jax.recipe import Recipe, resolve_dtype
from fastcifar_jax.runs import files
from fastcifar_jax.runs.parts import NETWORKS, TTAS, OwnPartError, PartError, build_or_own, to_json, typed
from fastcifar_jax.train import eval_variables, make_functions
from fastcifar_jax.tunable import tunable, with_tunable
from fastcifar_jax.types import Dataset, Logits, Pixels, flatten_by_path

FORMAT = 1
SUFFIX = ".safetensors"
MAX_FILE = 1 << 30  # bytes; a ResNet9 of the original width has 26 MB
MAX_HEADER = 1 << 20  # bytes; the same one's has 6 kB
MAX_SIDE = 1024  # pixels of an image


class SavedModelError(ValueError):
    """A model that cannot be saved or loaded; the message names the file, the fault and what to do."""


@dataclasses.dataclass(frozen=True, eq=False)
class SavedModel:
    """A trained network with all that its predictions depend on.

    Attributes:
      experiment: name of the recipe.
      seed: of the run.
      recipe_hash: of the whole recipe, as in the record.
      recipe_repr: the whole recipe as a Python expression, to be read by people.
      version: of the package that saved it.
      data_source: what it was trained on, as it was asked for.
      data_hash: of both splits, as in the record.
      test_hash: SHA-256 of the test images and labels, as `data.hash_of` has it.
      test_accuracy: on record, as a fraction.
      tta_accuracy: on record, with test-time augmentation, as a fraction.
      classes: names, in the order of the logits.
      image_shape: height, width and channels.
      mean: of the pixels, per channel, 0..255.
      std: of the pixels, per channel, 0..255.
      compute_dtype: a key of `PRECISIONS`.
      network: builds the model.
      tta: views of an image.
      variables: the evaluated ones, float32; averaged where the recipe has an average.
    """

    experiment: str
    seed: int
    recipe_hash: str
    recipe_repr: str
    version: str
    data_source: str
    data_hash: str
    test_hash: str
    test_accuracy: float
    tta_accuracy: float
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    compute_dtype: str
    network: Network
    tta: TTA
    variables: Variables = dataclasses.field(repr=False)

    def predict(self, images: Pixels | np.ndarray) -> Float[np.ndarray, "n classes"]:
        """The probabilities of the classes, with the model's own normalisation and test-time augmentation.

        Args:
          images: uint8 `[n, height, width, channels]` of `image_shape`; any number, a part of them at a time.

        Returns:
          float32, rows that sum to 1.

        Raises:
          ValueError: other images.
          SavedModelError: weights that give no finite logits.
        """
        images = np.asarray(self._checked(images))
        logits = [np.zeros((0, len(self.classes)), np.float32)]
        for start in range(0, len(images), CHUNK):
            chunk = images[start : start + CHUNK]
            # Filled up to a power of two, so that few programs serve chunks of any size.
            size = min(CHUNK, 1 << (len(chunk) - 1).bit_length())
            filled = np.concatenate([chunk, np.zeros((size - len(chunk), *self.image_shape), np.uint8)])
            logits.append(np.asarray(self._of_chunk(self._values, self.variables, filled)[1])[: len(chunk)])
        return softmax(_finite(np.concatenate(logits)).astype(np.float64), axis=-1).astype(np.float32)

    def logits(self, images: Pixels | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Logits of a whole test set without and with test-time augmentation, as the evaluation of a run has them.

        One program takes all images, in the chunks of `evaluate.evaluate`, so that its rounding is the same; it is
        compiled anew for each number of images.

        Args:
          images: uint8 `[n, height, width, channels]`, at least one.

        Returns:
          Twice float32 `[n, classes]`.

        Raises:
          ValueError: other images.
          SavedModelError: weights that give no finite logits.
        """
        images = self._checked(images)
        if not len(images):
            raise ValueError("there are no images; give one at least")
        plain, views = self._of_all(self._values, self.variables, images)
        return _finite(np.asarray(plain)), _finite(np.asarray(views))

    def _checked(self, images):
        if getattr(images, "dtype", None) != np.uint8 or images.ndim != 4 or images.shape[1:] != self.image_shape:
            given = f"{images.dtype} {images.shape}" if hasattr(images, "dtype") else type(images).__name__
            height, width, channels = self.image_shape
            raise ValueError(f"images are {given}; expected uint8 (n, {height}, {width}, {channels}), 0 to 255")
        return images

    @functools.cached_property
    def _recipe(self):
        """A recipe with the parts that count here and no more."""
        return Recipe(model=self.network, tta=self.tta, mean=self.mean, std=self.std, compute_dtype=self.compute_dtype)

    @functools.cached_property
    def _values(self):
        # Arguments of the program as in training: a constant would be rounded at another place.
        return {name: value for name, value in tunable(self._recipe).items() if name.startswith("model.")}

    @functools.cached_property
    def _of_chunk(self):
        return jax.jit(self._views)

    @functools.cached_property
    def _of_all(self):
        def of_all(values, variables, pixels):
            views = functools.partial(self._views, values, variables)
            parts = in_chunks(views, (pixels,), lambda stacked: stacked.reshape(-1, stacked.shape[-1]))
            return jax.tree.map(lambda *x: jnp.concatenate(x), *parts)

        return jax.jit(of_all)

    def _views(self, values: dict[str, Any], variables: Variables, pixels: Pixels) -> tuple[Logits, Logits]:
        model = with_tunable(self._recipe, values).model(len(self.classes), self.compute_dtype)
        images = normalize(pixels, self.mean, self.std, PRECISIONS[self.compute_dtype].images)
        predict = lambda images: model.apply(variables, images, False)[0]
        return predict(images), self.tta(predict, images)


TYPES = typing.get_type_hints(SavedModel)
JSON_FIELDS = [name for name in TYPES if name != "variables"]


def of_run(
    recipe: Recipe, info: DataInfo, dataset: Dataset, seed: int, variables: Variables, accuracies: tuple[float, float]
) -> SavedModel:
    """The model that a run has trained.

    Args:
      recipe: of the run.
      info: of its data.
      dataset: its data.
      seed: of the run.
      variables: `train.eval_variables` of its last state.
      accuracies: on the test images, without and with test-time augmentation.
    """
    recipe = resolve_dtype(recipe)
    _, height, width, channels = dataset.test_images.shape
    return SavedModel(
        experiment=recipe.name,
        seed=seed,
        recipe_hash=recipe.hash,
        recipe_repr=repr(recipe),
        version=__version__,
        data_source=info.source,
        data_hash=info.hash,
        test_hash=hash_of(dataset.test_images, dataset.test_labels),
        test_accuracy=accuracies[0],
        tta_accuracy=accuracies[1],
        classes=info.classes,
        image_shape=(height, width, channels),
        mean=recipe.mean,
        std=recipe.std,
        compute_dtype=recipe.compute_dtype,
        network=recipe.model,
        tta=recipe.tta,
        variables=variables,
    )


def check(recipe: Recipe, info: DataInfo, dataset: Dataset) -> None:
    """Makes sure, before anything is trained, that the model of a run can be saved and loaded again.

    Raises:
      SavedModelError: it cannot.
    """
    functions = make_functions(recipe, len(info.classes), len(dataset.train_labels))
    state = jax.eval_shape(functions.init, jax.eval_shape(lambda: jax.random.key(0)), dataset)
    blank = of_run(recipe, info, dataset, 0, eval_variables(state), (0.0, 0.0))
    with _faults_of(f"a model of {recipe.name!r}", "change the recipe, or leave out --save"):
        rebuilt = _rebuilt(_metadata_of(blank), recipe)
        _check_tensors(flatten_by_path(blank.variables), _expected(rebuilt))


def write(model: SavedModel, path: Path) -> None:
    """Writes a model, whole or not at all.

    Raises:
      RecordError: the file cannot be written; what was there before is still there.
    """
    tensors = {name: np.array(leaf, order="C") for name, leaf in flatten_by_path(model.variables).items()}
    files.write_bytes(path, safetensors.numpy.save(tensors, _metadata_of(model)))


def load(path: str | os.PathLike[str], *, recipe: Recipe | None = None) -> SavedModel:
    """Reads a saved model.

    Args:
      path: of a file that `run --save` wrote.
      recipe: where a model's network or test-time augmentation is no class of this package, the recipe that has it;
        of no account otherwise.

    Raises:
      SavedModelError: there is no such file, it is damaged or of another version, or it needs `recipe`.
    """
    with _faults_of(str(path), "save the model again, or fetch the file again"):
        data = _bounded_bytes(Path(path))
        tensors = safetensors.numpy.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        model = _rebuilt(header.get("__metadata__", {}), recipe)
        expected = _expected(model)
        _check_tensors(tensors, expected)
        for name, array in tensors.items():
            if not np.isfinite(array).all():
                raise SavedModelError(f"tensor {name!r} holds numbers that are not finite")
        leaves = [jax.device_put(tensors[name]) for name in flatten_by_path(expected)]
        variables = jax.tree.unflatten(jax.tree.structure(expected), leaves)
        return dataclasses.replace(model, variables=variables)


@contextlib.contextmanager
def _faults_of(what, advice):
    """Turns every error about a file into a SavedModelError that names it."""
    try:
        yield
    except OwnPartError as error:
        raise SavedModelError(f"{what}: {error}") from error
    except (SavedModelError, PartError) as error:
        raise SavedModelError(f"{what}: {error}; {advice}") from error
    except OSError as error:
        raise SavedModelError(f"{what} cannot be read: {error.strerror or error}; give the path of a model") from error
    except Exception as error:  # bytes from elsewhere may make a parser, or a network built from them, raise anything
        reason = "".join(c if c.isprintable() else " " for c in str(error)[:200])  # it may quote the bytes
        raise SavedModelError(f"{what} is no saved model ({type(error).__name__}: {reason}); {advice}") from error


def _bounded_bytes(path):
    """A file's bytes, if its size and that of its header are possible ones."""
    if not path.is_file():
        raise SavedModelError("there is no such file")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 8 < size <= MAX_FILE:
            raise SavedModelError(f"it has {size} bytes; expected a model of at most {MAX_FILE}")
        if not 0 < length <= min(MAX_HEADER, size - 8):
            raise SavedModelError(f"its header claims {length} bytes of {size}; at most {MAX_HEADER} are read")
        file.seek(0)
        return file.read(size)  # `read` allocates what it is asked for, whatever is there


# Names and shapes of the arrays.


def _expected(model: SavedModel) -> Variables:
    """The variables' shapes and dtypes by the network; a trace of the prediction shows that it fits the images."""
    network = model.network(len(model.classes), model.compute_dtype)
    key = jax.eval_shape(lambda: jax.random.key(0))
    variables = jax.eval_shape(network.init, key, jax.ShapeDtypeStruct((1, *model.image_shape), jnp.float32))
    for name, leaf in flatten_by_path(variables).items():
        if leaf.dtype != jnp.float32:
            raise SavedModelError(f"the network keeps {name!r} in {leaf.dtype}; saved models hold float32 only")
    pixels = jax.ShapeDtypeStruct((1, *model.image_shape), jnp.uint8)
    plain, views = jax.eval_shape(model._views, model._values, variables, pixels)
    if plain.shape != (1, len(model.classes)) or views.shape != plain.shape:
        raise SavedModelError(f"it gives logits {plain.shape} and {views.shape} for {len(model.classes)} classes")
    return variables


def _check_tensors(tensors: dict[str, Any], expected: Variables) -> None:
    named = flatten_by_path(expected)
    if lacking := sorted(named.keys() - tensors.keys()):
        raise SavedModelError(f"it lacks the tensors {', '.join(lacking)[:200]}")
    if unknown := sorted(tensors.keys() - named.keys()):
        raise SavedModelError(f"it holds the unknown tensors {', '.join(map(repr, unknown))[:200]}")
    for name, leaf in named.items():
        got = tensors[name]
        if got.dtype != leaf.dtype or got.shape != leaf.shape:
            raise SavedModelError(f"{name!r} is {got.dtype} {got.shape}; expected {leaf.dtype} {leaf.shape}")


def _finite(logits):
    if not np.isfinite(logits).all():
        raise SavedModelError("the model gives logits that are not finite; save it again, or fetch the file again")
    return logits


# The metadata: one JSON text, because the library does not keep the order of several.


def _metadata_of(model: SavedModel) -> dict[str, str]:
    fields = {"format": FORMAT, **{name: to_json(getattr(model, name)) for name in JSON_FIELDS}}
    return {"fastcifar_jax": json.dumps(fields)}


def _rebuilt(metadata: dict[str, str], recipe: Recipe | None) -> SavedModel:
    """The model of this metadata, without its variables."""
    if "fastcifar_jax" not in metadata:
        raise SavedModelError("another program has written it; expected a file of `run --save`")
    fields = json.loads(metadata["fastcifar_jax"])
    if fields["format"] != FORMAT:
        by = f"fastcifar_jax {fields.get('version')!r:.40}"
        raise SavedModelError(f"it is of format {fields['format']!r:.40}, by {by}; this version reads {FORMAT}")
    if fields.keys() != {"format", *JSON_FIELDS}:
        raise SavedModelError(f"its metadata are {sorted(fields)!s:.300}; expected format and {', '.join(JSON_FIELDS)}")
    values = {name: typed(fields[name], TYPES[name], name) for name in JSON_FIELDS if name not in ("network", "tta")}
    if not values["classes"] or values["compute_dtype"] not in PRECISIONS:
        raise SavedModelError(f"it has {len(values['classes'])} classes and dtype {values['compute_dtype']!r:.40}")
    height, width, channels = values["image_shape"]
    if not (1 <= min(height, width) and max(height, width) <= MAX_SIDE and channels == len(values["mean"])):
        raise SavedModelError(f"its images are {values['image_shape']}; expected sides of at most {MAX_SIDE}")
    network = build_or_own(fields["network"], NETWORKS, "network", recipe and recipe.model)
    tta = build_or_own(fields["tta"], TTAS, "tta", recipe and recipe.tta)
    return SavedModel(**values, network=network, tta=tta, variables={})
