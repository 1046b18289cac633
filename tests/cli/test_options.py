"""Seeds, sweeps and settings from the command line: a usable value, or one line that says what is wrong."""

import math
from pathlib import Path

import pytest
from hypothesis import strategies as st

from fastcifar_jax.cli.options import MAX_ARMS, parse_seeds, variants
from fastcifar_jax.runs import records
from tests.helpers_fuzz import ASSIGNMENTS, COUNTS, NAMES, VALUES, fuzz

RUN = ("run", "trick.py", "--data", "tiny.npz")


def test_parse_seeds():
    assert [list(parse_seeds(text)) for text in ("1", "3", "2-4", "7-7")] == [[0], [0, 1, 2], [2, 3, 4], [7]]


@pytest.mark.parametrize("count", COUNTS)
def test_any_seeds(count):
    def body(text):
        try:
            seeds = parse_seeds(text)
        except ValueError as error:
            assert "names no seeds" in str(error) and len(str(error)) < 200
            return
        assert 0 <= seeds[0] <= seeds[-1] < 2**32 and seeds.step == 1

    special = ("", "9" * 5000, "4294967296", "4294967295", "٣", "²", "1_0", " 1", "0x1")
    number = st.integers().map(str) | st.sampled_from(special)
    fuzz(count, st.one_of(number, st.tuples(number, number).map("-".join), st.text(max_size=20)), body)


def test_variants():
    assert variants(()) == [()]
    assert variants(("a=1,2", "b=3")) == [("a=1", "b=3"), ("a=2", "b=3")]
    with pytest.raises(ValueError, match=f"1,048,576 arms of each recipe; give at most {MAX_ARMS:,}"):
        variants([f"a{i}=1,2" for i in range(20)])


@pytest.mark.parametrize("count", COUNTS)
def test_any_sweeps(count):
    values = st.lists(VALUES, max_size=5).map(",".join)
    sweep = ASSIGNMENTS | st.tuples(st.sampled_from(NAMES), values).map("=".join)

    def body(sweeps):
        try:
            arms = variants(sweeps)
        except ValueError as error:
            assert "arms of each recipe" in str(error)
            return
        names = [text.partition("=")[0] for text in sweeps]
        assert len(arms) == math.prod(text.partition("=")[2].count(",") + 1 for text in sweeps) <= MAX_ARMS
        assert all([part.partition("=")[0] for part in arm] == names for arm in arms)

    fuzz(count, st.lists(sweep, max_size=4), body)


def test_a_sweep_is_an_arm_for_each_value(workplace, call):
    sweep = ("--sweep", "optim.peak_lr=0.1,0.2", "--sweep", "optim.momentum=0.5")
    status, out, err = call(*RUN, *sweep, "--seeds", "2")
    assert (status, err) == (0, "") and "4 of 4 seeds: 4 finished" in out
    assert "trick optim.peak_lr=0.2 optim.momentum=0.5: n = 2" in out
    found = list(records.find(Path("runs")).values())
    assert {record.recipe["optim.peak_lr"] for record in found} == {0.1, 0.2}
    assert sorted(record.result["compile_seconds"] > 0 for record in found) == [False, False, False, True]
    status, out, err = call("compare", "trick.py", *sweep)
    assert (status, err) == (0, "")
    assert "trick optim.peak_lr=0.2 optim.momentum=0.5 against trick optim.peak_lr=0.1" in out


@pytest.mark.parametrize("sweep", ["optim.peak_lr", "optim.peak_lr=0.1,,0.2", "optim.peak_lr=0.1,x"])
def test_a_sweep_of_nothing(workplace, call, loaded, trained, sweep):
    status, _, err = call(*RUN, "--sweep", sweep)
    assert status == 2 and "optim.peak_lr" in err and trained[1] == []


@pytest.mark.parametrize(
    "option",
    [
        ("--set", "optim.peak_lr=" + "-" * 100_000 + "1"), ("--set", "optim.peak_lr=9**9**9"), ("--set", "mean=3.0"),
        ("--set", "num_epochs=\0"), ("--sweep", "optim.peak_lr=1e999,2"),
        ("--sweep", "optim.peak_lr=" + "1," * 20_000), ("--epochs", "9" * 400), ("--width", "9" * 400),
        ("--limit-train", "9" * 400), ("--seeds", "5-" + "9" * 25), ("--seeds", "9" * 5000),
    ],
)  # fmt: skip
def test_hostile_options_are_one_line_and_leave_nothing(workplace, call, option):
    status, _, err = call(*RUN, *option)
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
    assert sorted(path.name for path in Path(".").iterdir() if path.name != "__pycache__") == ["tiny.npz", "trick.py"]
