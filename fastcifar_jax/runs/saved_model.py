"""Saved models: the weights that a run was evaluated with and its recipe, in one safetensors file.

Files are treated as untrusted: they hold arrays and JSON text, nothing in them is executed, and a class of the user's
own is taken from the recipe that the caller passes, never imported.
"""

import contextlib
import dataclasses
import functools
import json
import os
import typing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jaxtyping import Float
from scipy.special import softmax

from fastcifar_jax import __version__
from fastcifar_jax.augment import normalize
from fastcifar_jax.data.load import DataInfo, hash_of
from fastcifar_jax.evaluate import CHUNK, in_chunks
from fastcifar_jax.models.base import PRECISIONS, Variables
from fastcifar_jax.recipe import Recipe, from_dict, to_dict
from fastcifar_jax.runs import files
from fastcifar_jax.serialization import Parts, UnknownPartError, from_plain, own_parts
from fastcifar_jax.types import Dataset, Pixels, flatten_by_path

FORMAT = 2
KEY = "fastcifar_jax"  # of the description, in the metadata of the file
SUFFIX = ".safetensors"
MAX_FILE = 1 << 30  # bytes; a ResNet9 of the original width takes 26 MB
MAX_HEADER = 1 << 20  # bytes; that of the same ResNet9 takes 7 kB
MAX_SIDE = 1024  # pixels of an image


class SavedModelError(ValueError):
    """A model that cannot be saved or loaded; the message names the file, what is wrong and what to do."""


@dataclasses.dataclass(frozen=True, eq=False)
class SavedModel:
    """A trained network with everything that its predictions depend on."""

    recipe: Recipe
    seed: int
    version: str  # of the package that saved it
    data_source: str  # training data, as given to `load_data`
    data_hash: str  # of both splits, as in the record
    test_hash: str  # SHA-256 of the test images and labels
    test_accuracy: float  # on record, as a fraction
    tta_accuracy: float  # with test-time augmentation
    classes: tuple[str, ...]  # names, in the order of the logits
    image_shape: tuple[int, int, int]  # height, width and channels
    variables: Variables = dataclasses.field(repr=False)  # float32; the averaged ones where the recipe has an average

    def __post_init__(self):
        height, width, channels = self.image_shape
        if type(self.seed) is not int or not 0 <= self.seed < 2**32:
            raise SavedModelError(f"seed is {self.seed!r:.80}; expected a whole number from 0 to below 2**32")
        if not self.classes or self.recipe.compute_dtype == "auto":
            raise SavedModelError(f"it has {len(self.classes)} classes and dtype {self.recipe.compute_dtype!r}")
        if not (1 <= min(height, width) and max(height, width) <= MAX_SIDE and channels == len(self.recipe.mean)):
            raise SavedModelError(f"its images are {self.image_shape}; expected sides of at most {MAX_SIDE} pixels")

    def predict(self, images: Pixels | np.ndarray) -> Float[np.ndarray, "n classes"]:
        """Class probabilities with test-time augmentation, float32.

        Args:
          images: uint8 `[n, height, width, channels]` of `image_shape`; any number.

        Raises:
          ValueError: images of another shape or dtype.
          SavedModelError: weights that give logits that are not finite.
        """
        images = np.asarray(self._checked(images))
        # Padded to a power of two or to whole chunks, so that few sizes are compiled.
        size = 1 << max(len(images) - 1, 0).bit_length()
        size = size if size < CHUNK else -(-len(images) // CHUNK) * CHUNK
        padded = np.pad(images, ((0, size - len(images)), (0, 0), (0, 0), (0, 0)))
        logits = self.logits(padded)[1][: len(images)]
        return softmax(logits.astype(np.float64), axis=-1).astype(np.float32)

    def logits(self, images: Pixels | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Logits without and with test-time augmentation, float32 `[n, classes]` each.

        Computed as in `evaluate.evaluate`, so with the same rounding, by a program that is compiled for each `n`.

        Raises:
          ValueError: no images, or images that are not uint8 `[n, height, width, channels]`.
          SavedModelError: weights that give logits that are not finite.
        """
        if not len(self._checked(images)):
            raise ValueError("there are no images; give at least one")
        plain, views = map(np.asarray, self._evaluate(self.variables, images))
        if not (np.isfinite(plain).all() and np.isfinite(views).all()):
            raise SavedModelError("the model gives logits that are not finite; save it again, or fetch the file again")
        return plain, views

    def _checked(self, images):
        given, shape = (getattr(images, name, None) for name in ("dtype", "shape"))
        if given != np.uint8 or len(shape) != 4 or shape[1:] != self.image_shape:
            expected = ", ".join(map(str, self.image_shape))
            raise ValueError(f"images are {type(images).__name__} {given} {shape}; expected uint8 (n, {expected})")
        return images

    @functools.cached_property
    def _evaluate(self):
        """(variables, pixels) -> logits without and with test-time augmentation, jitted."""
        recipe = self.recipe
        model = recipe.model(len(self.classes), recipe.compute_dtype)

        def chunk(predict, pixels):
            images = normalize(pixels, recipe.mean, recipe.std, PRECISIONS[recipe.compute_dtype].images)
            return predict(images), recipe.tta(predict, images)

        def evaluate(variables, pixels):
            both = functools.partial(chunk, lambda images: model.apply(variables, images, False)[0])
            parts = in_chunks(both, (pixels,), lambda stacked: stacked.reshape(-1, stacked.shape[-1]))
            return jax.tree.map(lambda *x: jnp.concatenate(x), *parts)

        return jax.jit(evaluate)


_CHECKED_APART = ("recipe", "seed", "variables")
FACTS = {name: hint for name, hint in typing.get_type_hints(SavedModel).items() if name not in _CHECKED_APART}


def of_run(
    recipe: Recipe, info: DataInfo, dataset: Dataset, seed: int, variables: Variables, accuracies: tuple[float, float]
) -> SavedModel:
    """The model of a run: its recipe with a resolved dtype, its data, seed, `eval_variables`, and test accuracies
    without and with test-time augmentation."""
    _, height, width, channels = dataset.test_images.shape
    facts = (__version__, info.source, info.hash, hash_of(dataset.test_images, dataset.test_labels), *accuracies)
    return SavedModel(recipe, seed, *facts, info.classes, (height, width, channels), variables)


def check_saveable(recipe: Recipe, info: DataInfo, dataset: Dataset) -> None:
    """Checks, before anything is trained, that the model of a run can be saved and loaded again.

    Raises:
      SavedModelError: it cannot.
    """
    with _errors_about(f"a model of {recipe.name!r}", "change the recipe, or leave out --save"):
        model = _from_json(_to_json(of_run(recipe, info, dataset, 0, {}, (0.0, 0.0))), recipe)
        if model.recipe != recipe:
            raise SavedModelError(f"its recipe would be loaded as {model.recipe}; rename classes of your own")
        _shapes_of_variables(model)


def save_model(model: SavedModel, path: Path) -> None:
    """Writes a model, whole or not at all.

    Raises:
      RecordError: the file cannot be written; what was there before is still there.
    """
    tensors = {name: np.array(leaf, order="C") for name, leaf in flatten_by_path(model.variables).items()}
    files.write_bytes(path, safetensors.numpy.save(tensors, {KEY: _to_json(model)}))


def load_model(path: str | os.PathLike[str], recipe: Recipe | None = None) -> SavedModel:
    """Reads a model that `run --save` wrote.

    Args:
      path: of the file.
      recipe: has the parts that are classes of your own; needed only if the model's recipe has such parts.

    Raises:
      SavedModelError: there is no such file, it is damaged or of another version, or it needs `recipe`.
    """
    with _errors_about(str(path), "save the model again, or fetch the file again"):
        tensors, text = _read(Path(path))
        model = _from_json(text, recipe)
        shapes = _shapes_of_variables(model)
        expected = flatten_by_path(shapes)
        if tensors.keys() != expected.keys():
            differing = ", ".join(map(repr, sorted(tensors.keys() ^ expected.keys())))
            raise SavedModelError(f"tensors that differ from the network's: {differing:.200}")
        for name, leaf in expected.items():
            array = tensors[name]
            if array.dtype != leaf.dtype or array.shape != leaf.shape:
                raise SavedModelError(f"{name!r} is {array.dtype} {array.shape}; expected {leaf.dtype} {leaf.shape}")
            if not np.isfinite(array).all():
                raise SavedModelError(f"{name!r} has values that are not finite")
        leaves = [jax.device_put(tensors[name]) for name in expected]
        return dataclasses.replace(model, variables=jax.tree.unflatten(jax.tree.structure(shapes), leaves))


@contextlib.contextmanager
def _errors_about(what, advice):
    """Turns every error about a file into a SavedModelError of one line that names it."""
    try:
        yield
    except Exception as error:  # bytes from elsewhere may make a parser, or a network built from them, raise anything
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        reason = "".join(c if c.isprintable() else " " for c in reason[:600])
        if isinstance(error, UnknownPartError):
            advice = "for a class of your own, give its recipe: load_model(path, recipe=my_recipe), or --recipe"
        raise SavedModelError(f"{what}: {reason}; {advice}") from error


def _read(path: Path) -> tuple[dict[str, np.ndarray], str]:
    """The tensors of a file and the description of the model."""
    size = path.stat().st_size if path.is_file() else -1  # a pipe would be waited for
    if size < 0:
        raise SavedModelError("there is no such file")
    if not 8 < size <= MAX_FILE:
        raise SavedModelError(f"it has {size} bytes; expected at most {MAX_FILE}")
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    if not 0 < length <= min(MAX_HEADER, size - 8):
        raise SavedModelError(f"its header claims {length} bytes of {size}; at most {MAX_HEADER} are read")
    tensors, header = safetensors.numpy.load(data), json.loads(data[8 : 8 + length])
    if KEY not in header.get("__metadata__", {}):
        raise SavedModelError("another program wrote it; expected a file of `run --save`")
    return tensors, header["__metadata__"][KEY]


def _to_json(model: SavedModel) -> str:
    values = {name: getattr(model, name) for name in ("seed", *FACTS)}
    return json.dumps({"format": FORMAT, "recipe": to_dict(model.recipe), **values})


def _from_json(text: str, recipe: Recipe | None) -> SavedModel:
    """The model without its variables."""
    values = json.loads(text)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise SavedModelError(f"its description is {values!r:.60}; this version reads format {FORMAT}")
    if values.keys() != {"format", "recipe", "seed", *FACTS}:
        raise SavedModelError(f"it describes {', '.join(values):.300}; expected recipe, seed, {', '.join(FACTS)}")
    facts = {name: from_plain(values[name], hint, name, Parts({})) for name, hint in FACTS.items()}
    return SavedModel(from_dict(values["recipe"], own_parts(recipe)), values["seed"], **facts, variables={})


def _shapes_of_variables(model: SavedModel) -> Variables:
    """Shapes and dtypes of the network's variables; traces a prediction to check that it fits the images."""
    network = model.recipe.model(len(model.classes), model.recipe.compute_dtype)
    key = jax.eval_shape(lambda: jax.random.key(0))
    variables = jax.eval_shape(network.init, key, jax.ShapeDtypeStruct((1, *model.image_shape), jnp.float32))
    for name, leaf in flatten_by_path(variables).items():
        if leaf.dtype != jnp.float32:
            raise SavedModelError(f"the network keeps {name!r} in {leaf.dtype}; saved models hold float32 only")
    both = jax.eval_shape(model._evaluate, variables, jax.ShapeDtypeStruct((1, *model.image_shape), jnp.uint8))
    if any(logits.shape != (1, len(model.classes)) for logits in both):
        raise SavedModelError(f"it gives logits {both} for {len(model.classes)} classes")
    return variables
