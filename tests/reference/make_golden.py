"""Remakes the golden numbers with the PyTorch twin, in float64.

    python -m tests.reference.make_golden

Run it when the specification changes, never to make a failing test pass.
"""

import json
import pathlib
from collections.abc import Iterable

import torch

from tests.reference import torch_airnet
from tests.reference.problem import AIRBENCH, EPOCHS, LADDER, Case, initial_weights, summary, whitening_images
from tests.reference.torch_resnet9 import (
    ROWS,
    Row,
    TorchResNet9,
    normalized,
    shortened,
    to_flat,
    train_twin,
    whitening_bank,
    whitening_moments,
)

FOLDER = pathlib.Path(__file__).parent / "golden"


def golden(row: Row, case: Case) -> dict:
    """The summary of one run of the twin."""
    if case.num_epochs is not None:
        row = shortened(row, case.num_epochs)
    shapes = {path: x.shape for path, x in to_flat(TorchResNet9(row, case.width).state_dict(), row.groups).items()}
    return {"epochs": row.epochs, **summary(train_twin(row, case, initial_weights(shapes)))}


def write(name: str, **content) -> None:
    """One file, which says how it was made."""
    made = {"made_by": "python -m tests.reference.make_golden", "torch": torch.__version__, "dtype": "float64"}
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}.json").write_text(json.dumps({**made, **content}, indent=1) + "\n")


def write_trajectories(name: str, case: Case, recipes: Iterable[str]) -> None:
    """The case, then a trajectory a recipe."""
    write(name, case=case._asdict(), trajectories={recipe: golden(ROWS[recipe], case) for recipe in recipes})


def write_airbench() -> None:
    """Both optimisers of AirNet; the frozen whitening bias has no velocity to compare."""
    shapes = {
        path: x.shape
        for path, x in torch_airnet.flat(torch_airnet.TorchAirNet(AIRBENCH.width, 1.0).state_dict()).items()
    }
    found = {}
    for name, muon in (("airbench94", False), ("airbench94_muon", True)):
        run = torch_airnet.train_twin(AIRBENCH, initial_weights(shapes), muon=muon)
        velocity = {path: x for path, x in run.velocity.items() if path != "whiten/bias"}
        found[name] = summary(run._replace(velocity=velocity))
    write("airbench", case=AIRBENCH._asdict(), trajectories=found)


def write_whitening() -> None:
    """The variances of the whitened patches, lambda / (lambda + eps); filters are known up to a sign only."""
    images = normalized(whitening_images(), torch.float64)
    bank = whitening_bank(images).reshape(27, 27)
    write("whitening", variances=torch.diag(bank @ whitening_moments(images) @ bank.T).tolist())


if __name__ == "__main__":
    torch.set_num_threads(1)
    write_trajectories("ladder", LADDER, ROWS)
    write_trajectories("epochs", EPOCHS, ("baseline", "final"))
    write_whitening()
    write_airbench()
