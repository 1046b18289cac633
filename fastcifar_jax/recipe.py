"""A recipe: everything that a training run depends on, except the data and the seed."""

import ast
import dataclasses
import difflib
import hashlib
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from fastcifar_jax.augment import (
    AlternatingFlip,
    Augmentation,
    Crop,
    Cutout,
    Flip,
    GroupedSampling,
    IndependentSampling,
    Sampling,
)
from fastcifar_jax.averaging import Average, Ema, Lookahead
from fastcifar_jax.evaluate import TTA, FlipTTA, NoTTA, SixViewTTA
from fastcifar_jax.losses import CrossEntropy
from fastcifar_jax.models.activations import Celu, Gelu, Relu
from fastcifar_jax.models.airnet import AirNet
from fastcifar_jax.models.base import PRECISIONS, Network
from fastcifar_jax.models.resnet9 import ResNet9
from fastcifar_jax.muon import Muon
from fastcifar_jax.ops import backend
from fastcifar_jax.optim import AirbenchSGD, Nesterov, Optimizer
from fastcifar_jax.serialization import INT_LIMIT, Parts, from_plain, to_plain

CIFAR10_MEAN = (125.31, 122.95, 113.87)  # of the training images, red green blue, 0..255
CIFAR10_STD = (62.99, 62.09, 66.70)
MAX_TEXT = 1000  # characters of an assignment
PARTS = {  # what `from_dict` may build for each kind of part
    Augmentation: (Crop, Flip, AlternatingFlip, Cutout),
    Sampling: (IndependentSampling, GroupedSampling),
    Network: (ResNet9, AirNet),
    Callable: (CrossEntropy, Relu, Celu, Gelu),
    Optimizer: (Nesterov, AirbenchSGD, Muon),
    Average: (Ema, Lookahead),
    TTA: (NoTTA, FlipTTA, SixViewTTA),
}


@dataclasses.dataclass(frozen=True)
class Published:
    """What the source of a recipe reports for it.

    Attributes:
      accuracy: mean test accuracy, as a fraction; None where the source states none.
      seconds: training time on one `device`; None where the source states none.
      runs: number of runs in the mean; None where the source states none.
      tta: whether the accuracy is with test-time augmentation.
      source: citation.
      device: accelerator.
      petaflop: computation per run, in 1e15 operations; None where the source states none.
    """

    accuracy: float | None = None
    seconds: float | None = None
    runs: int | None = None
    tta: bool = False
    source: str = ""
    device: str = "V100"
    petaflop: float | None = None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A training run as a value: frozen, comparable, printed in full by `repr`.

    The parts are callable objects; a new trick is a frozen dataclass that satisfies the protocol of its part.

    Attributes:
      name: of the experiment; not part of the hash.
      num_epochs: passes over the training images; with 9.9, the last one ends after nine tenths of its steps.
      batch_size: images per step; the remainder of an epoch is dropped.
      mean: of the pixels, per channel, 0..255.
      std: of the pixels, per channel, 0..255.
      augmentations: applied in this order.
      sampling: draws the order and the augmentation choices of an epoch.
      model: the network.
      loss: per example; its sum over the batch is differentiated.
      optim: builds the optax transformation, which receives the gradient of the mean loss.
      average: of the weights, used in evaluation; None for the last weights.
      tta: test-time augmentation.
      compute_dtype: "float32", "mixed" (bfloat16 operands in convolutions and the head, float32 elsewhere),
        "bfloat16", "float16" or "float64"; master weights are at least float32. "auto" is replaced by
        `backend.default_dtype()` before a run; records name the dtype that was used.
      init_images: number of training images, from the first on, that the network's initialisation uses.
      published: figures of the source; not part of the hash.

    Raises:
      ValueError: a value that no run could use; the message says what to change.
    """

    name: str = "recipe"
    num_epochs: int | float = 24
    batch_size: int = 512
    mean: tuple[float, ...] = CIFAR10_MEAN
    std: tuple[float, ...] = CIFAR10_STD
    augmentations: tuple[Augmentation, ...] = (Crop(4), Flip(), Cutout(8))
    sampling: Sampling = IndependentSampling()
    model: Network = ResNet9()
    loss: Callable = CrossEntropy()
    optim: Optimizer = Nesterov()
    average: Average | None = None
    tta: TTA = FlipTTA()
    compute_dtype: str = "auto"
    init_images: int = 10_000
    published: Published = Published()

    def __post_init__(self):
        for field in ("num_epochs", "batch_size", "init_images"):
            if not 1 <= getattr(self, field) < INT_LIMIT:
                raise ValueError(f"{field} is {getattr(self, field)}; give a number from 1 to below 2**31")
        if self.compute_dtype not in ("auto", *PRECISIONS):
            raise ValueError(f"compute_dtype is {self.compute_dtype!r}; choose one of auto, {', '.join(PRECISIONS)}")
        if len(self.mean) != len(self.std) or min(self.std, default=0) <= 0:
            raise ValueError(f"mean {self.mean} and std {self.std} need one number per channel, std above 0")
        if " at 0x" in repr(self):
            raise ValueError(
                f"a part of recipe {self.name!r} prints as a memory address, so records could not identify it: "
                f"{self!r}; make it a frozen dataclass with __call__"
            )
        self.optim(self.num_epochs, 1, self.batch_size)  # raises if its schedule does not fit the number of epochs

    @property
    def hash(self) -> str:
        """16 hexadecimal digits that identify everything but `name` and `published`."""
        text = repr(dataclasses.replace(self, name="", published=Published()))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def to_dict(recipe: Recipe, other: Callable[[Any], Any] | None = None) -> dict[str, Any]:
    """The whole recipe as plain JSON values; each part is a dict of its fields and the name of its class, "type".

    Args:
      recipe: of any parts.
      other: gives what stands for values other than numbers, strings, tuples and dataclasses, as `repr` does.

    Raises:
      ValueError: a part holds such a value, and there is no `other`.

    Example:
      >>> to_dict(Recipe())["loss"]
      {'type': 'CrossEntropy', 'label_smoothing': 0.0}
    """
    return to_plain(recipe, "recipe", other)


def from_dict(values: Mapping[str, Any], own_parts: Iterable[type] = ()) -> Recipe:
    """The inverse of `to_dict`. The values may be untrusted: only `PARTS` and `own_parts` are built, nothing is run.

    Args:
      values: as `to_dict` returns them, or as they come back from JSON.
      own_parts: classes outside this package that the values may name.

    Raises:
      UnknownPartError: a class that is not among those; it is a ValueError.
      ValueError: a missing or unknown field, a value of another type, or one that a part refuses.
    """
    return from_plain(values, Recipe, "recipe", Parts(PARTS, tuple(own_parts)))


def flatten(recipe: Recipe | Mapping[str, Any]) -> dict[str, Any]:
    """A recipe, or its `to_dict`, as one level of dotted names: `{"optim": "Nesterov", "optim.peak_lr": 0.4, ...}`.

    `name` and `published` are left out, as in the hash.

    Example:
      >>> flatten(Recipe())["optim"], flatten(to_dict(Recipe()))["augmentations.0.padding"]
      ('Nesterov', 4)
    """

    def walk(prefix, value):
        kind, items = None, {}
        if dataclasses.is_dataclass(value):
            kind, items = type(value).__name__, {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        elif isinstance(value, Mapping):
            kind, items = value.get("type"), {name: item for name, item in value.items() if name != "type"}
        elif isinstance(value, list | tuple):
            if any(isinstance(item, Mapping) or dataclasses.is_dataclass(item) for item in value):
                items = dict(enumerate(value))
        if prefix and (kind or not items):
            yield prefix, kind or value
        for name, item in items.items():
            yield from walk(f"{prefix}.{name}".lstrip("."), item)

    return {name: value for name, value in walk("", recipe) if name.split(".")[0] not in ("name", "published")}


def difference(recipe: Recipe, other: Recipe) -> dict[str, tuple[Any, Any]]:
    """Dotted names whose values differ, as `(value in recipe, value in other)`; None where a part is absent.

    Example:
      >>> difference(Recipe(num_epochs=10), Recipe())
      {'num_epochs': (10, 24)}
    """
    a, b = flatten(recipe), flatten(other)
    return {name: (a.get(name), b.get(name)) for name in {**a, **b} if a.get(name) != b.get(name)}


def override(recipe: Recipe, assignment: str) -> Recipe:
    """The recipe with one number, string or tuple replaced: `override(final, "optim.peak_lr=0.8")`.

    Args:
      recipe: not modified.
      assignment: a dotted name as in `flatten`, "=", and a Python literal.

    Raises:
      ValueError: an unknown name (the message lists the nearest ones), a value of another type, or one that the part
        refuses.

    Example:
      >>> override(Recipe(), "optim.peak_lr=0.8").optim.peak_lr
      0.8
      >>> override(Recipe(), "optim.peek_lr=0.8")
      Traceback (most recent call last):
      ValueError: recipe 'recipe' has no 'optim.peek_lr'; nearest: optim.peak_lr, optim.schedule, optim
    """
    name, equals, text = assignment.partition("=")
    if not equals:
        raise ValueError(f"{assignment!r:.80} is not an assignment; write name=value, as in optim.peak_lr=0.8")
    name, text = name.strip(), text.strip()
    if len(name) + len(text) > MAX_TEXT:
        raise ValueError(f"{assignment!r:.80} has {len(assignment):,} characters; at most {MAX_TEXT} are read")
    known = flatten(recipe)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        raise ValueError(f"recipe {recipe.name!r} has no {name!r}; nearest: {', '.join(near) or 'see show'}")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # all that it may raise
        value = text
    try:
        return _replace_at(recipe, name.split("."), value, name)
    except (TypeError, ArithmeticError) as error:  # of a part that did not expect such a value
        raise ValueError(f"{name} cannot be {value!r:.80} ({type(error).__name__}: {error})") from error


def change(
    recipe: Recipe, assignments: Sequence[str], epochs: int | None, width: int | None, dtype: str | None
) -> Recipe:
    """The recipe with the command line's options applied, assignments first, and its compute dtype resolved.

    Raises:
      ValueError: an unknown name or an impossible value.
    """
    for assignment in assignments:
        recipe = override(recipe, assignment)
    if width is not None and not 1 <= width < INT_LIMIT:
        raise ValueError(f"width is {width}; give a number of channels from 1 to below 2**31")
    changes: dict[str, Any] = {"num_epochs": epochs, "compute_dtype": dtype}
    changes["model"] = None if width is None else recipe.model.with_width(width)
    recipe = dataclasses.replace(recipe, **{name: value for name, value in changes.items() if value is not None})
    return resolve_dtype(recipe)


def resolve_dtype(recipe: Recipe) -> Recipe:
    """The recipe with the compute dtype "auto" replaced by the default of this machine."""
    if recipe.compute_dtype != "auto":
        return recipe
    return dataclasses.replace(recipe, compute_dtype=backend.default_dtype()[0])


def _replace_at(node: Any, path: list[str], value: Any, name: str) -> Any:
    head, *rest = path
    old = node[int(head)] if isinstance(node, tuple) else getattr(node, head)
    if rest:
        new = _replace_at(old, rest, value, name)
    elif dataclasses.is_dataclass(old) and value is not None:
        raise ValueError(f"{name} is {old}: a part, not a number; set one of its fields, or write a recipe file")
    else:
        hint = type(old) if isinstance(node, tuple) else typing.get_type_hints(type(node))[head]
        new = from_plain(value, hint, name, Parts({}))
        new = float(new) if isinstance(old, float) and type(new) is int else new
    if isinstance(node, tuple):
        return (*node[: int(head)], new, *node[int(head) + 1 :])
    return dataclasses.replace(node, **{head: new})
