"""Writes the golden numbers again, with the PyTorch baseline in float64.

    python -m tests.reference.make_golden [FOLDER]

Run it when the specification changes, never to make a failing test pass.
"""

import json
import pathlib
import sys

import numpy as np
import torch

from experiments.airbench import airbench94, airbench94_muon
from experiments.bag_of_tricks import RECIPES, baseline, final
from tests.helpers_torch import filters_and_moments, train_torch
from tests.reference.problem import AIRBENCH, EPOCHS, LADDER, summary
from tests.reference.trajectories import reduced

CASES = {
    "ladder": (LADDER, RECIPES),
    "epochs": (EPOCHS, (baseline, final)),
    "airbench": (AIRBENCH, (airbench94, airbench94_muon)),
}


def make() -> dict[str, dict]:
    """Name of a file -> its content, which says how it was made."""
    made = {"made_by": "python -m tests.reference.make_golden", "torch": torch.__version__, "dtype": "float64"}
    files = {}
    for name, (case, recipes) in CASES.items():
        found = {}
        for recipe in recipes:
            small = reduced(recipe, case)
            epochs = {} if case is AIRBENCH else {"epochs": small.num_epochs}
            found[recipe.name] = {**epochs, **summary(train_torch(small, case))}
        files[name] = {**made, "case": case._asdict(), "trajectories": found}
    filters, moments = filters_and_moments(final)
    # The variances of the whitened patches, lambda / (lambda + eps): filters are known up to a sign only.
    return files | {"whitening": {**made, "variances": np.diag(filters @ moments @ filters.T).tolist()}}


if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parent / "golden")
    folder.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    for name, content in make().items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
