"""The README's example is a recipe that runs, and its ladder is the declared one."""

import re
from pathlib import Path

import jax
import numpy as np

from experiments import bag_of_tricks
from fastcifar_jax.functions import check_trainable
from fastcifar_jax.runs import experiments as discover
from fastcifar_jax.types import Dataset

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_example_trick_fits_real_shapes(tmp_path):
    [code] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "my_trick.py").write_text(code)
    [experiment] = discover.resolve((str(tmp_path / "my_trick.py"),), None)
    assert experiment.recipe.name == "my_trick"
    assert experiment.recipe.loss != bag_of_tricks.final.loss
    image, label = jax.ShapeDtypeStruct((600, 32, 32, 3), np.uint8), jax.ShapeDtypeStruct((600,), np.int32)
    check_trainable(experiment.recipe, 10, Dataset(image, label, image, label))


def test_nothing_is_left_to_fill_in():
    assert not re.findall(r"^[A-Z]+_[A-Z_]+$", README, re.MULTILINE)


def test_every_rung_stands_in_the_readme_with_its_published_figures():
    for recipe in bag_of_tricks.RECIPES:
        row = next(line for line in README.splitlines() if line.startswith(f"| `{recipe.name}` "))  # of the ladder
        cells = [cell.strip() for cell in row.split("|")[1:-1]]
        assert cells[2] == str(recipe.num_epochs)
        accuracy, seconds = recipe.published.accuracy, recipe.published.seconds
        assert cells[3] == ("" if accuracy is None else f"{100 * accuracy:.1f} %")
        assert cells[4] == ("" if seconds is None else f"{seconds:g} s")
