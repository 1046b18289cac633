"""The README's example is a recipe that runs, and its steps have the declared figures."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import bag_of_tricks
from experiments.quickstart import quickstart
from fastcifar_jax.functions import check_trainable
from fastcifar_jax.recipe import difference
from fastcifar_jax.runs import experiments as discover
from fastcifar_jax.types import Dataset

ROOT = Path(__file__).parent.parent
README, RESULTS = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/results.md"))


def test_the_example_trick_fits_real_shapes(tmp_path):
    [code] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "my_trick.py").write_text(code)
    [experiment] = discover.resolve((str(tmp_path / "my_trick.py"),), None)
    assert experiment.recipe.name == "my_trick"
    assert {name.split(".")[0] for name in difference(experiment.recipe, quickstart)} == {"average"}
    image, label = jax.ShapeDtypeStruct((600, 32, 32, 3), np.uint8), jax.ShapeDtypeStruct((600,), np.int32)
    check_trainable(experiment.recipe, 10, Dataset(image, label, image, label))


def test_nothing_is_left_to_fill_in():
    assert not re.findall(r"^[A-Z]+_[A-Z_]+$", README, re.MULTILINE)


def steps_of(page):
    """The rows of the table of steps: name -> cells."""
    [table] = re.findall(r"^\| step \|[^\n]* V100 \|\n\|[^\n]*\n((?:\|[^\n]*\n)+)", page, re.MULTILINE)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    return {row[0].strip("`"): row for row in rows}


@pytest.mark.parametrize(
    "page, count", [(README, 10), (RESULTS, len(bag_of_tricks.RECIPES))], ids=["README", "results"]
)
def test_steps_stand_with_their_published_figures(page, count):
    declared = {recipe.name: recipe for recipe in bag_of_tricks.RECIPES}
    steps = steps_of(page)
    assert len(steps) == count
    assert list(steps) == [name for name in declared if name in steps]  # in their order
    for name, (_, _, epochs, accuracy, seconds) in steps.items():
        published = declared[name].published
        assert epochs == str(declared[name].num_epochs)
        assert accuracy == ("" if published.accuracy is None else f"{100 * published.accuracy:.1f} %")
        assert seconds == ("" if published.seconds is None else f"{published.seconds:g} s")
