"""How numbers, devices and values of records are written."""

from collections.abc import Mapping
from typing import Any

MAX_LENGTH = 500  # characters of a cell


def percent(fraction: float) -> str:
    """For example "94.08 %"."""
    return f"{100 * fraction:.2f} %"


def published_percent(fraction: float) -> str:
    """A published accuracy with one decimal, or two if it has them."""
    return f"{100 * fraction:.2f}".removesuffix("0") + " %"


def seconds(value: float) -> str:
    """For example "0.53 s", "26.1 s", "1,565 s"."""
    return f"{value:,.{2 if abs(value) < 10 else 1 if abs(value) < 100 else 0}f} s"


def counted(number: int, noun: str) -> str:
    """For example "1 core", "2 cores"."""
    return f"{number} {noun}{'s' * (number != 1)}"


def device_text(device: Mapping[str, Any]) -> str:
    """A `provenance.Device` in one line."""
    if device["platform"] == "cpu":
        return f"{device['cpu']}, {counted(device['cores'], 'core')}"
    return f"{device['count']} x {device['kind']}"


def data_text(data: Mapping[str, Any]) -> str:
    """A `provenance.Data` in one line: "digits, 1,437 training and 360 test images"."""
    return clean("{source}, {train:,} training and {test:,} test images".format_map(dict(data)))


def clean(value: Any) -> str:
    """A value as one line of at most `MAX_LENGTH` characters; unprintable characters become U+FFFD."""
    text = " ".join(str(value)[: 2 * MAX_LENGTH].split())
    return "".join(c if c.isprintable() else "\ufffd" for c in shorten(text, MAX_LENGTH))


def shorten(text: str, length: int) -> str:
    """The text, cut to `length` characters with an ellipsis at the end."""
    return text if len(text) <= length else f"{text[: length - 1]}\u2026"
