import io

import pytest
from rich.console import Console

from experiments.bag_of_tricks import final
from fastcifar_jax.cli import console as report
from fastcifar_jax.recipe import Published, Recipe
from fastcifar_jax.types import EpochInfo

INFO = EpochInfo(1, 2.0, 1.23456, 0.5, 1.0, 0.9408, 1.0, 0.945)


def watch(each_step, **kwargs):
    console = Console(file=io.StringIO(), width=100, highlight=False, **kwargs)
    with report.watch(console, "final, seed 0", final, 1030, compiles=True, each_step=each_step) as callbacks:
        on_epoch, on_step, on_compiled = callbacks
        on_compiled(3.0)
        if on_step is not None:
            on_step(1, 1, None)
        on_epoch(INFO)
        on_epoch(INFO._replace(epoch=2))
    return on_step, console.file.getvalue()


def test_plain_lines():
    on_step, text = watch(each_step=True)
    assert on_step is None
    assert text.splitlines() == [
        "final, seed 0: compiling",
        "epoch   train s      loss  accuracy      test       TTA  images/s",
        "    1      2.00    1.2346   50.00 %   94.08 %   94.50 %       512",
        "    2      2.00    1.2346   50.00 %   94.08 %   94.50 %       512",
    ]


@pytest.mark.parametrize("each_step", [True, False])
def test_terminal(each_step):
    on_step, text = watch(each_step=each_step, force_terminal=True)
    assert (on_step is not None) == each_step
    assert "94.08 %" in text and "final, seed 0: epoch 2 of 10" in text


def test_published_line():
    assert report.published_line(final).startswith("published for final: test 94.1 % with TTA, 26 s on one V100 (How")
    none = Recipe(name="x", published=Published(source="a book"))
    assert report.published_line(none) == "published for x: no figures (a book)"
    many = Recipe(name="x", published=Published(0.9441, runs=5, source="a book"))
    assert report.published_line(many) == "published for x: test 94.41 %, mean of 5 runs (a book)"


def test_device_text():
    device = {"kind": "NVIDIA H100", "platform": "gpu", "count": 2, "cpu": "abacus", "cores": 3}
    assert report.device_text(device) == "2 x NVIDIA H100"
    assert report.device_text({**device, "platform": "cpu"}) == "abacus, 3 cores"
    assert report.device_text({**device, "platform": "cpu", "cores": 1}) == "abacus, 1 core"
