"""Hostile values, damaged files, and how often each target is tried."""

import copy

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments import airbench, bag_of_tricks
from fastcifar_jax.recipe import flatten

COUNTS = (20, pytest.param(2_000, marks=pytest.mark.slow, id="slow"))
EXTREMES = tuple(
    sign * (1 << bits) + more for bits in (0, 7, 8, 15, 16, 31, 32, 63) for sign in (1, -1) for more in (-1, 0)
)
SENTINEL = "was_executed"  # the file that a text or a pickle would make
TEXTS = (
    f"__import__('pathlib').Path('{SENTINEL}').touch()", "\0", "\ud800", "\x1b[2J", "../../etc", "x" * 300, "<script>",
    "finished", "diverged", "final*", "torch",
)  # fmt: skip


def fuzz(count, strategy, body):
    """Calls `body` with `count` values of `strategy`, the same ones every time, however long each takes."""
    checks = list(HealthCheck)
    settings(max_examples=count, derandomize=True, deadline=None, suppress_health_check=checks)(given(strategy)(body))()


def mutants(content):
    """Strategies of the bytes `content` that are damaged, one or a few places at a time."""
    position = st.integers(0, len(content) - 1)

    def flip(changes):
        flipped = bytearray(content)
        for where, value in changes:
            flipped[where] = value
        return bytes(flipped)

    def number(where, value, size, order):
        field = (value % (1 << 8 * size)).to_bytes(size, order)
        return content[:where] + field + content[where + size :]

    return st.one_of(
        st.lists(st.tuples(position, st.integers(0, 255)), min_size=1, max_size=8).map(flip),
        position.map(lambda end: content[:end]),
        st.tuples(position, position).map(lambda pair: content[: pair[0]] + content[pair[1] :]),
        st.tuples(position, st.binary(max_size=24)).map(lambda at: content[: at[0]] + at[1] + content[at[0] :]),
        st.builds(
            number,
            position,
            st.sampled_from(EXTREMES),
            st.sampled_from((1, 2, 4, 8)),
            st.sampled_from(("little", "big")),
        ),
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.sampled_from(EXTREMES + TEXTS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(("type", "shape", "kind")), inner),
    max_leaves=6,
)


def changed(value, draw):
    """`value` with one of its values, or of those inside them, replaced."""
    value = part = copy.deepcopy(value)
    while True:
        key = draw(st.sampled_from(sorted(part) if isinstance(part, dict) else range(len(part))))
        if not part[key] or not isinstance(part[key], dict | list) or draw(st.booleans()):
            part[key] = draw(JSON)
            return value
        part = part[key]


def set_value(values, name, value):
    """Replaces the value called `name`, as in "model.norm.eps", in nested dicts."""
    *parents, last = name.split(".")
    for parent in parents:
        values = values[parent]
    values[last] = value


# Assignments to the values of recipes, as in `--set optim.peak_lr=0.8`.

RECIPES = (bag_of_tricks.baseline, bag_of_tricks.final, *airbench.RECIPES)
NAMES = sorted({name for recipe in RECIPES for name in flatten(recipe)})
LITERALS = (
    "9**9**9", "1e999", "-1e999", "nan", "inf", "1e308", "0x" + "f" * 300, "1_0", "True", "None", "...", "0j", "()",
    "((", "{[]:1}", "{}", "'a'", "b'a'", "'\\ud800'", "\ud800", "\0", "'\\d'", "(" * 1000, "-" * 100_000, "[" * 300,
    "1" * 100_000, "(1,)*10**9", "0if 1else 2", "lambda: 0", "f'{1}'", "layer1", "float32", "auto", TEXTS[0],
)  # fmt: skip
VALUES = st.one_of(
    (JSON | st.complex_numbers() | st.binary(max_size=3) | st.lists(JSON, max_size=4).map(tuple)).map(repr),
    st.floats(0, 1).map(repr), st.integers(1, 64).map(repr), st.sampled_from(LITERALS), st.text(max_size=20),
)  # fmt: skip
ASSIGNMENTS = st.one_of(
    st.tuples(st.sampled_from(NAMES), VALUES).map("=".join),
    st.tuples(st.sampled_from(("model", "augmentations.0", "optim.schedule.", "name", "." * 9)), VALUES).map("=".join),
    st.text(max_size=20),
)
