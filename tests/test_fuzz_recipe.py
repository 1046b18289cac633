"""Recipe overrides, sweeps, seeds and arms from hostile texts: a usable value, or a ValueError."""

import math
from pathlib import Path

import pytest
from hypothesis import strategies as st

from experiments import airbench, bag_of_tricks
from fastcifar_jax.analysis.compare import parse_arm
from fastcifar_jax.cli.options import MAX_ARMS, parse_seeds, variants
from fastcifar_jax.recipe import Recipe, change, flatten, from_dict, override, to_dict
from tests.helpers_fuzz import COUNTS, EXTREMES, fuzz

RECIPES = (bag_of_tricks.baseline, bag_of_tricks.final, *airbench.RECIPES)
NAMES = sorted({name for recipe in RECIPES for name in flatten(recipe)})
SENTINEL = "was_executed"
TEXTS = (
    "9**9**9", "1e999", "-1e999", "nan", "inf", "1e308", "0x" + "f" * 300, "1_0", "True", "None", "...", "0j", "()",
    "((", "{[]:1}", "{}",
    "'a'", "b'a'", "'\\ud800'", "\ud800", "\0", "'\\d'", "(" * 1000, "-" * 100_000, "[" * 300, "1" * 100_000,
    "(1,)*10**9", "0if 1else 2",
    f"__import__('pathlib').Path('{SENTINEL}').touch()", f"open('{SENTINEL}', 'w')", "lambda: 0", "f'{1}'", "layer1",
    "float32", "auto",
)  # fmt: skip
LITERALS = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.complex_numbers(), st.text(max_size=5),
        st.binary(max_size=3),
        st.sampled_from(EXTREMES), st.floats(0, 1), st.integers(1, 64), st.sampled_from(("layer1", "layer2", "mixed")),
    ),
    lambda inner: st.lists(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple),
    max_leaves=6,
).map(repr)  # fmt: skip
VALUES = st.one_of(LITERALS, st.sampled_from(TEXTS), st.text(max_size=20))
ASSIGNMENTS = st.one_of(
    st.tuples(st.sampled_from(NAMES), VALUES).map("=".join),
    st.tuples(
        st.text(max_size=20) | st.sampled_from(("model", "augmentations.0", "optim.schedule.", "name", "." * 9)), VALUES
    ).map("=".join),
    st.text(max_size=20),
)


def numbers(value):
    """All numbers in the value of a recipe's field."""
    if isinstance(value, tuple):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, int | float):
        yield value


@pytest.mark.parametrize("count", COUNTS)
def test_override(tmp_path, monkeypatch, count):
    monkeypatch.chdir(tmp_path)

    def body(case):
        recipe, assignment = case
        try:
            changed = override(recipe, assignment)
        except ValueError as error:
            assert 0 < len(str(error)) < 1000
            return
        assert isinstance(changed, Recipe) and len(changed.hash) == 16
        assert all(math.isfinite(x) and abs(x) < 1e309 for value in flatten(changed).values() for x in numbers(value))
        assert override(recipe, assignment) == changed

    fuzz(count, st.tuples(st.sampled_from(RECIPES), ASSIGNMENTS), body)
    assert not (tmp_path / SENTINEL).exists()


@pytest.mark.parametrize("count", COUNTS)
def test_from_dict(count):
    """One value anywhere in a recipe is replaced."""
    plain = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(EXTREMES),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(("type", "size")), inner),
        max_leaves=6,
    )

    def body(data):
        values = part = to_dict(data.draw(st.sampled_from(RECIPES)))
        while True:
            key = data.draw(st.sampled_from(sorted(part) if isinstance(part, dict) else range(len(part))))
            if not part[key] or not isinstance(part[key], dict | list) or data.draw(st.booleans()):
                break
            part = part[key]
        part[key] = data.draw(plain)
        try:
            recipe = from_dict(values)
        except ValueError as error:
            assert 0 < len(str(error)) < 1000
            return
        assert to_dict(recipe) == values

    fuzz(count, st.data(), body)


@pytest.mark.parametrize("count", COUNTS)
def test_change(count):
    numbers = st.none() | st.integers() | st.sampled_from((10**400, *EXTREMES))
    case = st.tuples(st.sampled_from(RECIPES), st.lists(ASSIGNMENTS, max_size=3), numbers, numbers)

    def body(case):
        try:
            changed = change(*case, "float32")
        except ValueError:
            return
        assert changed.compute_dtype == "float32" and len(changed.hash) == 16

    fuzz(count, case, body)


@pytest.mark.parametrize("count", COUNTS)
def test_sweeps(count):
    sweep = st.one_of(
        ASSIGNMENTS, st.tuples(st.sampled_from(NAMES), st.lists(VALUES, max_size=5).map(",".join)).map("=".join)
    )

    def body(sweeps):
        try:
            arms = variants(sweeps)
        except ValueError as error:
            assert "arms of each recipe" in str(error)
            return
        values = [text.partition("=")[2].count(",") + 1 for text in sweeps]
        assert len(arms) == math.prod(values) <= MAX_ARMS
        names = [text.partition("=")[0] for text in sweeps]
        assert all([part.partition("=")[0] for part in arm] == names for arm in arms)

    fuzz(count, st.lists(sweep, max_size=4), body)


@pytest.mark.parametrize("count", COUNTS)
def test_seeds(count):
    def body(text):
        try:
            seeds = parse_seeds(text)
        except ValueError as error:
            assert "names no seeds" in str(error) and len(str(error)) < 200
            return
        assert 0 <= seeds[0] <= seeds[-1] < 2**32 and seeds.step == 1

    number = st.integers().map(str) | st.sampled_from(
        ("", "9" * 5000, "4294967296", "4294967295", "٣", "²", "1_0", " 1", "0x1")
    )
    fuzz(count, st.one_of(number, st.tuples(number, number).map("-".join), st.text(max_size=20)), body)


@pytest.mark.parametrize("count", COUNTS)
def test_arms(count):
    def body(text):
        try:
            framework, experiment, prefix = parse_arm(text)
        except ValueError as error:
            assert "is not an arm" in str(error)
            return
        assert framework in ("jax", "torch") and experiment and "@" not in experiment
        assert set(prefix) <= set("0123456789abcdef")
        assert text.endswith(f"{experiment}@{prefix}" if prefix else experiment)

    piece = st.sampled_from(("jax", "torch", ":", "@", "final", "*", ".py", "1a2b", "\n", "\0", "\ud800")) | st.text(
        max_size=5
    )
    fuzz(count, st.lists(piece, max_size=6).map("".join), body)


@pytest.mark.parametrize(
    ("assignment", "fault"),
    [
        ("optim.peak_lr=" + "-" * 100_000 + "1", "100,015 characters; at most 1000"),
        ("optim.peak_lr={[]: 1}", "expected float"),
        ("optim.peak_lr=1e999", "finite numbers"),
        ("optim.peak_lr=0x" + "f" * 300, "finite numbers"),
        ("num_epochs=0x" + "f" * 300, "whole ones below 2\\*\\*31"),
        ("batch_size=4294967296", "whole ones below 2\\*\\*31"),
        ("mean=3.0", "expected tuple"),
        ("std=(None, 1, 2)", "std.0: expected float, got None"),
        ("model.channels=(1.5, 2, 3, 4)", "model.channels.0: expected int, got 1.5"),
        ("model.res_layers=([],)", "model.res_layers.0: expected str"),
        ("optim.schedule.warmup=(0.1,)", "expected float"),
    ],
)
def test_override_refuses(assignment, fault):
    with pytest.raises(ValueError, match=fault):
        override(bag_of_tricks.final, assignment)


def test_a_sweep_of_too_many_arms():
    with pytest.raises(ValueError, match=f"1,048,576 arms of each recipe; give at most {MAX_ARMS:,}"):
        variants([f"a{i}=1,2" for i in range(20)])


@pytest.mark.parametrize(
    "option",
    [
        ("--set", "optim.peak_lr=" + "-" * 100_000 + "1"), ("--set", "optim.peak_lr=9**9**9"), ("--set", "mean=3.0"),
        ("--set", "num_epochs=\0"),
        ("--sweep", "optim.peak_lr=1e999,2"), ("--sweep", "optim.peak_lr=" + "1," * 20_000), ("--epochs", "9" * 400),
        ("--width", "9" * 400),
        ("--limit-train", "9" * 400), ("--seeds", "5-" + "9" * 25), ("--seeds", "9" * 5000),
    ],
)  # fmt: skip
def test_hostile_options_are_one_line_and_leave_nothing(workplace, call, option):
    status, _, err = call("run", "trick.py", "--data", "tiny.npz", *option)
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
    assert sorted(path.name for path in Path(".").iterdir() if path.name != "__pycache__") == ["tiny.npz", "trick.py"]
