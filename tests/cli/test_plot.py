"""The command `plot`: every kind leaves a picture, and mistakes leave none."""

from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from fastcifar_jax.report import plot_data
from fastcifar_jax.runs import records
from fastcifar_jax.train import Diverged
from tests.helpers_page import record
from tests.helpers_plot import NORMED


def check_picture(path):
    if path.suffix == ".png":
        with Image.open(path) as image:
            image.verify()
            assert min(image.size) > 100
    else:
        assert ElementTree.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"


@pytest.mark.parametrize(
    "command",
    [
        "augmentations baseline --set augmentations.0.padding=2 --limit-train 5",
        "whitening --patch 2",
        "activations",
        "schedule baseline final airbench94 --epochs 8",
        "bn-dynamics normed.py --epochs 1 --width 3 --set batch_size=32",
        "convergence",
        "curves runs/final",
        "network --width 4",
    ],
)
def test_every_kind_leaves_a_picture(workplace, loaded, call, command):
    Path("normed.py").write_text(NORMED)
    for seed in range(2):
        records.write(record(seed=seed), Path("runs"))
    forms = ("svg",) if command.startswith("bn") else ("png", "svg")  # one training is enough
    for form in forms:
        status, out, _ = call("plot", *command.split(), "--out", f"pictures/it.{form}")
        assert status == 0 and f"wrote pictures/it.{form}" in out
        check_picture(Path(f"pictures/it.{form}"))
    assert len(list(Path("pictures").iterdir())) == len(forms)


@pytest.mark.parametrize(
    ("command", "status", "message"),
    [
        ("augmentations nothing --out a.png", 2, "there is no experiment 'nothing'"),
        ("whitening whitening_* --out a.png", 2, "whitening_* stands for 2 recipes; name one"),
        ("schedule missing.py --out a.png", 2, "there is no file missing.py"),
        ("schedule final --epochs 0 --out a.png", 2, "num_epochs is 0"),
        ("bn-dynamics trick.py --out a.png", 2, "no batch norm with a trained scale or bias"),
        ("convergence nowhere --out a.png", 2, "no records in nowhere"),
        ("curves --out a.png", 2, "no records in runs"),
        ("curves diverged --out a.png", 2, "no run in diverged has finished"),
        ("curves trick.py --out a.png", 2, "trick.py is not a record of a run"),
        ("activations --out a.pdf", 2, "a.pdf must end with .png or .svg"),
        ("activations --out trick.py/a.png", 1, "cannot write trick.py/a.png"),
        ("activations", 2, "Missing option '--out'"),
        ("pie --out a.png", 2, "No such command 'pie'"),
        ("celu --out a.png", 2, "plot celu is not used any more; use plot activations"),
        ("network nothing --out a.png", 2, "there is no experiment 'nothing'"),
        ("network trick.py --out a.png", 2, "has no function `layers`"),
    ],
)
def test_mistakes_are_one_line_and_leave_no_file(workplace, loaded, call, command, status, message):
    records.write(record(status="diverged"), Path("diverged"))
    before = set(Path().iterdir())
    found, _, err = call("plot", *command.split())
    assert found == status and message in err and err.startswith("error: ") and err.count("\n") == 1
    assert set(Path().iterdir()) == before


def test_a_diverged_run_is_reported(workplace, loaded, call, monkeypatch):
    def train_epochs(recipe, num_classes, key, dataset):
        raise Diverged(recipe.name, record().epochs)

    monkeypatch.setattr(plot_data, "train_epochs", train_epochs)
    Path("normed.py").write_text(NORMED)
    status, _, err = call("plot", "bn-dynamics", "normed.py", "--out", "a.png")
    assert status == 2 and "normed diverged in epoch 2" in err and not Path("a.png").exists()
