"""Frozen dataclasses as plain JSON values, and back from values that may come from an untrusted file."""

import collections.abc
import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

INT_LIMIT = 2**31  # of whole numbers; steps are counted in int32
FLOAT_LIMIT = 2.0**127  # finite in float32
MAX_LENGTH = 10_000  # characters of a string, items of a tuple
LIMITS = f"finite numbers, whole ones below 2**31, and at most {MAX_LENGTH:,} printable characters"
SCALARS = (bool, int, float, str, types.NoneType)

Allowed = Mapping[Any, Sequence[type]]  # type hint of a field -> the dataclasses that may be built for it


class UnknownPartError(ValueError):
    """A class that may not be built; the message names it and the allowed ones."""


def to_plain(value: Any, name: str = "value") -> Any:
    """A dataclass as a dict of its fields, with the name of its class as "type"; a tuple as a list.

    Args:
      value: a dataclass, a tuple, None, a bool, a number or a string.
      name: of the value in error messages.

    Raises:
      ValueError: `value` holds something else.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value)]
        return {
            "type": type(value).__name__,
            **{field: to_plain(getattr(value, field), f"{name}.{field}") for field in fields},
        }
    if type(value) is tuple:
        return [to_plain(item, f"{name}.{i}") for i, item in enumerate(value)]
    if type(value) in SCALARS:
        return value
    raise ValueError(f"{name}: expected a number, string, tuple or frozen dataclass of these, got {value!r:.200}")


def from_plain(value: Any, hint: Any, name: str, allowed: Allowed, own: Sequence[type] = ()) -> Any:
    """A plain value as what the type hint of a field asks for: types exact, numbers finite, lengths bounded.

    Args:
      value: as `to_plain` returns it; nothing in it is executed.
      hint: a scalar type, a dataclass, or a tuple, union, Literal, Callable or protocol of those.
      name: dotted name of the field, for error messages.
      allowed: the classes that may be built; a dataclass that is itself the hint needs no entry.
      own: further classes, allowed for every Callable and protocol, and for the dataclasses that they extend.

    Raises:
      UnknownPartError: a class that is not allowed.
      ValueError: any other value that the hint or a dataclass's own checks refuse.
    """
    if not _is_bounded(value):
        raise ValueError(f"{name}: got {value!r:.80}; give {LIMITS}")
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _build(value, [hint, *(cls for cls in own if issubclass(cls, hint))], name, allowed, own)
    if (origin or hint) is collections.abc.Callable or getattr(hint, "_is_protocol", False):
        return _build(value, [*allowed.get(origin or hint, ()), *own], name, allowed, own)
    if origin in (typing.Union, types.UnionType):
        for option in args:
            try:
                return from_plain(value, option, name, allowed, own)
            except ValueError:
                if isinstance(value, dict) and option is not types.NoneType:
                    raise  # the fault is inside the part
    elif origin is tuple or hint is tuple:
        if isinstance(value, list | tuple) and len(value) <= MAX_LENGTH:
            kinds = args or (Any, ...)
            kinds = kinds[:1] * len(value) if kinds[-1] is ... else kinds
            if len(kinds) == len(value):
                items = enumerate(zip(value, kinds, strict=True))
                return tuple(from_plain(item, kind, f"{name}.{i}", allowed, own) for i, (item, kind) in items)
    elif origin is typing.Literal:
        if any(type(value) is type(choice) and value == choice for choice in args):
            return value
    elif type(value) in SCALARS and (hint in (type(value), Any) or (hint is float and type(value) is int)):
        return value
    raise ValueError(f"{name}: expected {_describe(hint)}, got {value!r:.200}")


def part_classes(value: Any) -> Iterator[type]:
    """The classes of a dataclass and of all dataclasses in its fields."""
    if dataclasses.is_dataclass(value):
        yield type(value)
        value = tuple(getattr(value, field.name) for field in dataclasses.fields(value))
    if isinstance(value, tuple):
        for item in value:
            yield from part_classes(item)


def _build(value, classes, name, allowed, own):
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
    built = {field: from_plain(value[field], hints[field], f"{name}.{field}", allowed, own) for field in fields}
    try:
        return cls(**built)
    except (TypeError, ArithmeticError) as error:  # of a class that did not expect such a value
        raise ValueError(f"{name}: {cls.__name__} refuses its values ({type(error).__name__}: {error})") from error


def _is_bounded(value: Any) -> bool:
    if type(value) in (int, float):
        return abs(value) < (INT_LIMIT if type(value) is int else FLOAT_LIMIT)
    # A terminal must not obey what a file holds.
    return not isinstance(value, str) or (len(value) <= MAX_LENGTH and value.isprintable())


def _describe(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")
