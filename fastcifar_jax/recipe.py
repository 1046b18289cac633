"""A recipe: everything that a training run depends on, besides the data and the seed."""

import ast
import dataclasses
import difflib
import hashlib
import math
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

from fastcifar_jax.augment import Augmentation, Crop, Cutout, Flip, IndependentSampling, Sampling
from fastcifar_jax.averaging import Average
from fastcifar_jax.evaluate import TTA, FlipTTA
from fastcifar_jax.losses import CrossEntropy
from fastcifar_jax.models.base import PRECISIONS, Network
from fastcifar_jax.models.resnet9 import ResNet9
from fastcifar_jax.ops import backend
from fastcifar_jax.optim import Nesterov, Optimizer

CIFAR10_MEAN = (125.31, 122.95, 113.87)  # of the training images, red green blue, 0..255
CIFAR10_STD = (62.99, 62.09, 66.70)
MAX_TEXT = 1000  # characters of an assigned value
BELOW = 2**31  # of whole numbers; steps are counted in int32


@dataclasses.dataclass(frozen=True)
class Published:
    """What the source of a recipe reports for it.

    Attributes:
      accuracy: mean test accuracy, as a fraction; None where the source states none.
      seconds: training time on one `device`; None where the source states none.
      runs: how many runs the mean is of; None where the source does not say.
      tta: whether the accuracy is with test-time augmentation.
      source: where it says so.
      device: one accelerator.
      petaflop: computation of a run, in 1e15 operations; None where the source states none.
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

    The parts are objects that can be called; a new trick is a frozen dataclass that satisfies the part's protocol.

    Attributes:
      name: of the experiment; not part of the hash.
      num_epochs: passes over the training images; of 9.9 the last ends after nine tenths of its steps.
      batch_size: images a step; an epoch's remainder is dropped.
      mean: of the pixels, per channel, 0..255.
      std: of the pixels, per channel, 0..255.
      augmentations: applied in this order.
      sampling: how an epoch's order and options are drawn.
      model: the network.
      loss: per example; its sum over the batch is differentiated.
      optim: builds the optax transformation, which receives the gradient of the mean loss.
      average: of the weights; evaluation uses it when there is one.
      tta: views of a test image.
      compute_dtype: "float32", "mixed" (bfloat16 operands in convolutions and the head, float32 between them),
        "bfloat16", "float16" or "float64"; the weights are kept in float32 at least. "auto" is what
        `backend.default_dtype` says where the run is made; records name the dtype that it stood for.
      init_images: how many training images, from the first on, the network's initialisation sees.
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
            if not 1 <= getattr(self, field) < BELOW:
                raise ValueError(f"{field} is {getattr(self, field)}; give a number from 1 to below 2**31")
        if self.compute_dtype not in ("auto", *PRECISIONS):
            raise ValueError(f"compute_dtype is {self.compute_dtype!r}; choose one of auto, {', '.join(PRECISIONS)}")
        if len(self.mean) != len(self.std) or min(self.std) <= 0:
            raise ValueError(f"mean {self.mean} and std {self.std} need one number a channel, std above 0")
        if " at 0x" in repr(self):
            raise ValueError(
                f"a part of recipe {self.name!r} prints as an address, so a record could not say what it was: "
                f"{self!r}; make it a frozen dataclass with __call__"
            )
        self.optim(self.num_epochs, 1, self.batch_size)  # a schedule that does not fit raises here

    @property
    def hash(self) -> str:
        """16 hexadecimal digits that name everything but `name` and `published`."""
        text = repr(dataclasses.replace(self, name="", published=Published()))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def flatten(recipe: Recipe) -> dict[str, Any]:
    """The recipe as one level of dotted names: `{"optim": "Nesterov", "optim.peak_lr": 0.4, ...}`.

    Left out are `name` and `published`, as in the hash.

    Example:
      >>> flatten(Recipe())["optim"], flatten(Recipe())["augmentations.0.padding"]
      ('Nesterov', 4)
    """

    def walk(prefix, value):
        if dataclasses.is_dataclass(value):
            if prefix:
                yield prefix, type(value).__name__
            for field in dataclasses.fields(value):
                yield from walk(f"{prefix}.{field.name}".lstrip("."), getattr(value, field.name))
        elif isinstance(value, tuple) and any(dataclasses.is_dataclass(item) for item in value):
            for i, item in enumerate(value):
                yield from walk(f"{prefix}.{i}", item)
        else:
            yield prefix, value

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
      recipe: is left as it is.
      assignment: a dotted name as in `flatten`, "=", and a Python literal.

    Raises:
      ValueError: an unknown name (the nearest ones are listed), a value of another type, or one that the part refuses.

    Example:
      >>> override(Recipe(), "optim.peak_lr=0.8").optim.peak_lr
      0.8
      >>> override(Recipe(), "optim.peek_lr=0.8")
      Traceback (most recent call last):
      ValueError: recipe 'recipe' has no 'optim.peek_lr'; nearest: optim.peak_lr, optim.schedule, optim
    """
    name, equals, text = assignment.partition("=")
    if not equals:
        raise ValueError(f"{assignment!r:.80} is no assignment; write name=value, as in optim.peak_lr=0.8")
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
    """The recipe with the options of `run` applied, the assignments first, and its dtype resolved.

    Raises:
      ValueError: an unknown name or an impossible value.
    """
    for assignment in assignments:
        recipe = override(recipe, assignment)
    if width is not None and not 1 <= width < BELOW:
        raise ValueError(f"width is {width}; give a number of channels from 1 to below 2**31")
    changes: dict[str, Any] = {"num_epochs": epochs, "compute_dtype": dtype}
    changes["model"] = None if width is None else recipe.model.with_width(width)
    recipe = dataclasses.replace(recipe, **{name: value for name, value in changes.items() if value is not None})
    return resolve_dtype(recipe)


def resolve_dtype(recipe: Recipe) -> Recipe:
    """The recipe with "auto" replaced by the compute dtype that this machine is given."""
    if recipe.compute_dtype != "auto":
        return recipe
    return dataclasses.replace(recipe, compute_dtype=backend.default_dtype())


def _replace_at(node: Any, path: list[str], value: Any, name: str) -> Any:
    head, *rest = path
    if isinstance(node, tuple):
        i = int(head)
        new = _replace_at(node[i], rest, value, name) if rest else _checked(node[i], value, type(node[i]), name)
        return (*node[:i], new, *node[i + 1 :])
    old = getattr(node, head)
    if rest:
        new = _replace_at(old, rest, value, name)
    else:
        new = _checked(old, value, typing.get_type_hints(type(node))[head], name)
    return dataclasses.replace(node, **{head: new})


def _checked(old: Any, value: Any, hint: Any, name: str) -> Any:
    """`value`, if it may stand where `old` stands."""
    if dataclasses.is_dataclass(old) and value is not None:
        raise ValueError(f"{name} is {old}: a part, not a number; set one of its fields, or write a recipe file")
    if not _is_usable(value):
        raise ValueError(f"{name} cannot be {value!r:.80}; give finite numbers, whole ones below 2**31")
    if isinstance(old, float) and type(value) is int:
        value = float(value)
    of_old_type = type(value) is type(old) and typing.get_origin(hint) is not tuple
    if of_old_type or _allows(hint, value):
        return value
    raise ValueError(f"{name} is {old!r}; expected {_hint_name(hint)}, got {value!r:.200}")


def _is_usable(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_usable, value))
    return math.isfinite(value) if isinstance(value, float) else not isinstance(value, int) or abs(value) < BELOW


def _allows(hint: Any, value: Any) -> bool:
    """Whether the type hint of a field allows a value; how many items a tuple has is the part's to check."""
    arguments = [argument for argument in typing.get_args(hint) if argument is not ...]
    if typing.get_origin(hint) is tuple:
        return type(value) is tuple and all(any(_allows(kind, item) for kind in arguments) for item in value)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_allows(kind, value) for kind in arguments)
    return type(value) is hint or (hint is float and type(value) is int)


def _hint_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")
