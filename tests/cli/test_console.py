import io
from pathlib import Path

import pytest
from rich.console import Console

from experiments.bag_of_tricks import final
from fastcifar_jax.cli import console as view
from fastcifar_jax.data.load import DataInfo
from fastcifar_jax.recipe import Published, Recipe
from fastcifar_jax.runs.runner import Event, Existing, LoadedData, RunSpec
from fastcifar_jax.types import EpochInfo
from tests.helpers_records import RECORD

INFO = EpochInfo(1, 2.0, 1.23456, 0.5, 1.0, 0.9408, 1.0, 0.945)
SPEC = RunSpec("final", final, Path("final.py"), False, LoadedData(None, DataInfo("x", "0", (), 1030, 10), 0.5))
HEADER = "epoch   train s      loss  accuracy      test       TTA  images/s"


def shown(news, seeds=False, step=None, monkeypatch=None, **kwargs):
    """The lines that a run leaves; `step` is reported before the first epoch ends."""
    console = Console(file=io.StringIO(), width=120, highlight=False, **kwargs)
    run_view = view.RunView(console)
    for event in run_view.show([Event(SPEC, 0, item) for item in news], seeds):
        if event.news == "training" and step is not None:
            run_view.on_steps(1, step)
    return console.file.getvalue()


def test_plain_lines():
    text = shown(["compiling", "training", INFO, INFO._replace(epoch=2), RECORD], step=1)
    assert text.splitlines()[:4] == [
        "final, seed 0: compiling",
        HEADER,
        "    1      2.00    1.2346   50.00 %   94.08 %   94.50 %       512",
        "    2      2.00    1.2346   50.00 %   94.08 %   94.50 %       512",
    ]
    assert text.splitlines()[4:] == [view.seed_line("final", RECORD)]
    assert shown(["training"]) == "final, seed 0: training\n"
    assert shown(["warning: no room"]) == "final, seed 0: warning: no room\n"


def test_progress_inside_an_epoch_is_a_line_after_a_while(monkeypatch):
    times = [0.0, 0.0, 31.0, 40.0]

    class Clock:
        perf_counter = staticmethod(lambda: times.pop(0) if times[1:] else times[0])

    monkeypatch.setattr(view, "time", Clock)
    lines = shown(["training", INFO], step=1).splitlines()
    assert lines[1] == "final, seed 0: epoch 1 of 10, step 1 of 20, 17 images/s, 10 min left"


def test_rows_of_seeds_side_by_side_name_their_seed():
    lines = shown(["compiling", INFO, INFO], seeds=True).splitlines()
    assert lines[1] == HEADER and lines[2].endswith("512   seed 0") and len(lines) == 4


def test_existing_records():
    assert shown([Existing(RECORD, ())]).endswith("abacus, 2 cores (on record; --rerun repeats it)\n")
    assert "(on record, with different conv, mesh; --rerun" in shown([Existing(RECORD, ("conv", "mesh"))])


def test_terminal():
    text = shown(["compiling", "training", INFO], step=1, force_terminal=True)
    assert "94.08 %" in text and "final, seed 0: epoch 1 of 10" in text and "step 1 of 20" in text


def test_published_line():
    assert view.published_line(final).startswith("published for final: test 94.1 % with TTA, 26 s on one V100 (How")
    none = Recipe(name="x", published=Published(source="a book"))
    assert view.published_line(none) == "published for x: no figures (a book)"
    many = Recipe(name="x", published=Published(0.9441, runs=5, source="a book"))
    assert view.published_line(many) == "published for x: test 94.41 %, mean of 5 runs (a book)"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "2 x NVIDIA H100"),
        ({"platform": "cpu"}, "abacus, 3 cores"),
        ({"platform": "cpu", "cores": 1}, "abacus, 1 core"),
    ],
)
def test_device_text(changes, text):
    device = {"kind": "NVIDIA H100", "platform": "gpu", "count": 2, "cpu": "abacus", "cores": 3, **changes}
    assert view.device_text(device) == text
