"""Parts of recipes as JSON, and back: what a file may name is one of this package's own classes, and nothing else."""

import collections.abc
import dataclasses
import typing
from typing import Any

from fastcifar_jax.evaluate import FlipTTA, NoTTA, SixViewTTA
from fastcifar_jax.models.activations import Celu, Gelu, Relu
from fastcifar_jax.models.airnet import AirNet
from fastcifar_jax.models.layers import BatchNormConfig
from fastcifar_jax.models.resnet9 import ResNet9

NETWORKS = (ResNet9, AirNet)
ACTIVATIONS = (Relu, Celu, Gelu)
TTAS = (NoTTA, FlipTTA, SixViewTTA)
KNOWN = (*NETWORKS, *ACTIVATIONS, *TTAS, BatchNormConfig)


class PartError(ValueError):
    """A value that no part has; the message names it and what was expected."""


class OwnPartError(PartError):
    """A part of the caller's own that was not given, or another one."""


def to_json(value: Any) -> Any:
    """A part, a tuple, number or string as JSON has it; `{"repr": ...}` where it holds anything but those.

    A class of this package becomes an object of its fields with its name as "class".
    """
    try:
        return _known(value)
    except _Foreign:
        return {"repr": repr(value)}


class _Foreign(TypeError):
    pass


def _known(value):
    if type(value) in KNOWN:
        parts = {field.name: _known(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"class": type(value).__name__, **parts}
    if isinstance(value, tuple):
        return [_known(item) for item in value]
    if type(value) in (bool, int, float, str):
        return value
    raise _Foreign


def build(value: Any, kinds: tuple[type, ...], name: str) -> Any:
    """An instance of one of these dataclasses from its JSON; the class's own checks come after those of the types.

    Raises:
      PartError: another class, other fields, or a field of another type.
      ValueError: the class refuses a value.
    """
    kind = {kind.__name__: kind for kind in kinds}.get(str(value.get("class"))) if isinstance(value, dict) else None
    if kind is None:
        raise PartError(f"{name} is {value!r:.200}; expected one of {', '.join(k.__name__ for k in kinds)}")
    names = [field.name for field in dataclasses.fields(kind)]
    if value.keys() != {"class", *names}:
        raise PartError(f"{name} has {sorted(value)!s:.300}; expected {', '.join(names)}")
    types = typing.get_type_hints(kind)
    return kind(**{field: typed(value[field], types[field], f"{name}.{field}") for field in names})


def build_or_own(value: Any, kinds: tuple[type, ...], name: str, own: Any) -> Any:
    """As `build`, but a part that `to_json` has kept as its `repr` is the caller's `own`, which must print the same.

    Raises:
      OwnPartError: `own` is None or another part.
      PartError: as in `build`.
      ValueError: the class refuses a value.
    """
    if not isinstance(value, dict) or value.keys() != {"repr"}:
        return build(value, kinds, name)
    expected = typed(value["repr"], str, name)
    if own is None:
        raise OwnPartError(
            f"its {name} is {expected:.300}, not made of classes of this package alone; give the recipe that has it: "
            "load(path, recipe=my_recipe), or --recipe on the command line"
        )
    if repr(own) != expected:
        raise OwnPartError(f"its {name} is {expected:.300}; the given recipe's is {own!r:.300}: change the recipe")
    return own


def typed(value: Any, hint: Any, name: str) -> Any:
    """`value` as what the type hint of a field asks for; lists become tuples.

    Raises:
      PartError: it is of another type, a number that float32 cannot hold, or a string that a terminal could not show.
      ValueError: the class of a part refuses a value.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return build(value, (hint,), name)
    if origin is collections.abc.Callable:
        return build(value, ACTIVATIONS, name)
    if origin is tuple and isinstance(value, list):
        args = args[:1] * len(value) if args[-1] is Ellipsis else args
        if len(value) == len(args):
            return tuple(typed(item, arg, name) for item, arg in zip(value, args, strict=True))
    elif (
        (origin is typing.Literal and value in args)
        or (hint is float and type(value) in (int, float) and abs(value) < 2**127)  # finite in float32
        or (hint is int and type(value) is int and 0 <= value < 2**32)
        or (hint is bool and type(value) is bool)
        or (hint is str and type(value) is str and value.isprintable())  # no escape sequences for a terminal
    ):
        return value
    raise PartError(f"{name} is {value!r:.200}; expected {hint.__name__ if isinstance(hint, type) else hint}")
