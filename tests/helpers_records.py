"""A finished record and a diverged one, and copies of records with some values changed."""

import dataclasses
import json
import math
from pathlib import Path

from experiments.bag_of_tricks import final
from fastcifar_jax.recipe import flatten
from fastcifar_jax.runs.provenance import Provenance
from fastcifar_jax.runs.records import Record
from fastcifar_jax.types import EpochInfo

TIMES = {"train_seconds", "setup_seconds", "transfer_seconds", "compile_seconds", "images_per_second"}
EPOCHS = (EpochInfo(1, 3.5, 1.5, 0.5, 1.25, 0.75, 1.2, 0.76), EpochInfo(2, 4.0, 0.5, 0.75, 0.25, 0.9408, 0.2, 0.945))
RESULT = {
    "test_accuracy": 0.9408,
    "tta_accuracy": 0.945,
    "train_seconds": 9.0,
    "setup_seconds": 1.0,
    "transfer_seconds": 0.5,
    "compile_seconds": 20.0,
    "images_per_second": 1000.0,
}
PROVENANCE = Provenance(
    data={"source": "cifar10", "hash": "0123456789abcdef", "train": 50_000, "test": 10_000},
    device={"kind": "cpu", "platform": "cpu", "count": 1, "cpu": "abacus", "cores": 2},
    versions={"python": "3.11"},
    source_hash="ab",
    precision="float32",
    conv="lax",
    mesh="1x1",
    settings={"jax_enable_x64": False, "XLA_FLAGS": None},
)
RECORD = Record(
    experiment="final",
    framework="jax",
    recipe=flatten(final),
    recipe_repr=repr(final),
    recipe_hash=final.hash,
    seed=3,
    status="finished",
    error=None,
    provenance=PROVENANCE,
    command=("run", "final"),
    started="2026-01-01T00:00:00+00:00",
    epochs=EPOCHS,
    result=RESULT,
)
DIVERGED = dataclasses.replace(
    RECORD,
    status="diverged",
    error="final diverged",
    result=None,
    epochs=(EpochInfo(1, 3.5, math.nan, 0.1, math.inf, 0.1, -math.inf, 0.1),),
)


def with_changes(record, **changes):
    """A copy with fields of the record or of its provenance replaced; a dict is merged into the provenance's own."""
    made, own = {}, {}
    for name, value in changes.items():
        old = getattr(record.provenance, name, None)
        target = made if hasattr(record.provenance, name) else own
        target[name] = {**old, **value} if isinstance(old, dict) else value
    return dataclasses.replace(record, **own, provenance=dataclasses.replace(record.provenance, **made))


def edit(path, **changes):
    """Changes fields of a record's file, of the record or of its provenance."""
    fields = json.loads(path.read_text())
    for name, value in changes.items():
        target = fields["provenance"] if name in fields["provenance"] else fields
        target[name] = value
    path.write_text(json.dumps(fields))


def without_times(path):
    """A record's file but for times and the command."""
    record = json.loads(Path(path).read_text())
    for name in ("started", "command"):
        del record[name]
    record["result"] = {name: value for name, value in record["result"].items() if name not in TIMES}
    for row in record["epochs"]:
        del row["train_seconds"]
    return record
