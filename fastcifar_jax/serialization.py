"""Plain JSON values, which may come from an untrusted file, checked against type hints; dataclasses as such values."""

import collections.abc
import dataclasses
import functools
import math
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

INT_LIMIT = 2**31  # of whole numbers in a part; steps are counted in int32
FLOAT_LIMIT = 2.0**127  # of numbers in a part; finite in float32
MAX_LENGTH = 10_000  # characters of a string and items of a tuple in a part
LIMITS = f"finite numbers, whole ones below 2**{{}}, and at most {MAX_LENGTH:,} printable characters"


class UnknownPartError(ValueError):
    """A class that may not be built; the message names it and the allowed ones."""


class Parts(NamedTuple):
    """The classes that a plain value may name; a dataclass that is itself the hint needs no entry."""

    allowed: Mapping[Any, Sequence[type]]  # by the type hint of a field
    own: Sequence[type] = ()  # for every Callable and protocol, and for the dataclasses that they extend


def to_plain(value: Any, name: str = "value", other: Callable[[Any], Any] | None = None) -> Any:
    """A dataclass as a dict of its fields, with the name of its class as "type"; a tuple as a list.

    Args:
      value: a dataclass, a tuple, None, a bool, a number or a string.
      name: of the value in error messages.
      other: gives what stands for any other value; None to refuse it.

    Raises:
      ValueError: `value` holds something else.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value)]
        plain = {field: to_plain(getattr(value, field), f"{name}.{field}", other) for field in fields}
        return {"type": type(value).__name__, **plain}
    if type(value) is tuple:
        return [to_plain(item, f"{name}.{i}", other) for i, item in enumerate(value)]
    if value is None or type(value) in (bool, int, float, str):
        return value
    if other is not None:
        return other(value)
    raise ValueError(f"{name}: expected a number, string, tuple or frozen dataclass of these, got {value!r:.200}")


def from_plain(value: Any, hint: Any, name: str, parts: Parts | None = None) -> Any:
    """A plain value as what a type hint asks for: types exact, numbers finite. Nothing in it is executed.

    With `parts`, a dict is one of these classes as `to_plain` writes it, and numbers and lengths are bounded. Without,
    it is the dataclass, NamedTuple or TypedDict of the hint; unknown keys are ignored, and None for a float is NaN.

    Args:
      value: from a JSON file.
      hint: a scalar type, a class with fields, or a tuple, dict, union, Literal, Callable or protocol of those; of an
        Annotated, the second argument counts.
      name: dotted name of the value, for error messages.
      parts: the classes that may be built.

    Raises:
      UnknownPartError: a class that is not one of `parts`.
      ValueError: any other value that the hint or a dataclass's own checks refuse.

    Example:
      >>> from_plain({"loss": [1.5, "2"]}, dict[str, tuple[float, ...]], "run")
      Traceback (most recent call last):
      ValueError: run.loss.1: expected float, got '2'
    """
    if not _is_bounded(value, parts):
        raise ValueError(f"{name}: got {value!r:.80}; give {LIMITS.format(31 if parts else 63)}")
    args = typing.get_args(hint)
    kind = typing.get_origin(hint) or hint
    if kind is Annotated:
        return from_plain(value, args[1], name, parts)
    if parts and (classes := _classes(kind, parts)) is not None:
        return _build(value, classes, name, parts)
    if kind in (typing.Union, types.UnionType):
        if value is None and types.NoneType in args:
            return None
        for option in args:
            try:
                return from_plain(value, option, name, parts)
            except ValueError:
                if isinstance(value, dict) and option is not types.NoneType:
                    raise  # the fault is inside it
    elif kind is tuple and isinstance(value, list | tuple) and not (parts and len(value) > MAX_LENGTH):
        hints = args or (Any, ...)
        hints = hints[:1] * len(value) if hints[-1] is ... else hints
        if len(hints) == len(value):
            items = enumerate(zip(value, hints, strict=True))
            return tuple(from_plain(item, hint, f"{name}.{i}", parts) for i, (item, hint) in items)
    elif not parts and isinstance(value, dict) and (kind is dict or _fields(kind)):
        return _from_object(value, kind, args, name)
    elif kind is Literal:
        if any(type(value) is type(choice) and value == choice for choice in args):
            return value
    elif not parts and (kind is Any or (kind is float and value is None)):
        return value if kind is Any else math.nan
    elif kind in (type(value), Any) or (kind is float and type(value) is int):
        if value is None or type(value) in (bool, int, float, str):
            return value
    raise ValueError(f"{name}: expected {_describe(hint)}, got {value!r:.200}")


def own_parts(value: Any) -> tuple[type, ...]:
    """The classes outside this package of a dataclass and of all dataclasses in its fields."""
    own: tuple[type, ...] = ()
    if dataclasses.is_dataclass(value):
        own = () if type(value).__module__.startswith("fastcifar_jax.") else (type(value),)
        value = tuple(getattr(value, field.name) for field in dataclasses.fields(value))
    return sum(map(own_parts, value), own) if isinstance(value, tuple) else own


def _classes(kind, parts):
    """The classes that a part may have; None where no part is expected."""
    if kind is collections.abc.Callable or getattr(kind, "_is_protocol", False):
        return [*parts.own, *parts.allowed.get(kind, ())]
    if dataclasses.is_dataclass(kind):
        return [*(cls for cls in parts.own if issubclass(cls, kind)), kind]
    return None


def _build(value, classes, name, parts):
    """An instance of the one of these classes that the value names; the class's own checks run last."""
    by_name = {cls.__name__: cls for cls in reversed(classes)}  # the first of two with one name
    cls = by_name.get(value["type"]) if isinstance(value, dict) and isinstance(value.get("type"), str) else None
    if cls is None:
        names = ", ".join(dict.fromkeys(cls.__name__ for cls in classes)) or "no class"
        raise UnknownPartError(f"{name}: expected a dict whose type is one of {names}, got {value!r:.200}")
    fields = [field.name for field in dataclasses.fields(cls)]
    if value.keys() != {"type", *fields}:
        given = ", ".join(map(repr, value.keys() - {"type"}))
        raise ValueError(f"{name}: expected the fields {', '.join(fields)} of {cls.__name__}, got {given:.300}")
    hints = typing.get_type_hints(cls)
    built = {field: from_plain(value[field], hints[field], f"{name}.{field}", parts) for field in fields}
    try:
        return cls(**built)
    except (TypeError, ArithmeticError) as error:  # of a class that did not expect such a value
        raise ValueError(f"{name}: {cls.__name__} refuses its values ({type(error).__name__}: {error})") from error


@functools.cache
def _fields(kind):
    """The fields of a dataclass, NamedTuple or TypedDict with their types; {} for other types."""
    return typing.get_type_hints(kind, include_extras=True) if isinstance(kind, type) else {}


def _from_object(value, kind, args, name):
    """A dict as a dict of one type of values, or as a class with fields."""
    if kind is dict:
        return {key: from_plain(item, args[1], f"{name}.{key:.40}") for key, item in value.items()}
    hints = _fields(kind)
    if missing := sorted(hints.keys() - value.keys()):
        raise ValueError(f"{name} lacks {', '.join(missing)}")
    return kind(**{field: from_plain(value[field], hint, f"{name}.{field}") for field, hint in hints.items()})


def _is_bounded(value, parts):
    if type(value) in (int, float):
        limits = (INT_LIMIT, FLOAT_LIMIT) if parts else (2**63, math.inf)
        return abs(value) < limits[type(value) is float]
    # A terminal must not obey what a file holds.
    return not parts or not isinstance(value, str) or (len(value) <= MAX_LENGTH and value.isprintable())


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, typing.get_args(hint)))}"
    is_class = isinstance(hint, type) and not typing.get_args(hint)
    return hint.__name__ if is_class else re.sub(r"\w+\.", "", str(hint))
