"""A finished record, and copies of records with some values changed."""

import dataclasses

from experiments.bag_of_tricks import final
from fastcifar_jax.recipe import flatten
from fastcifar_jax.runs.records import Record
from fastcifar_jax.types import EpochInfo

RECORD = Record(
    experiment="final",
    framework="jax",
    recipe=flatten(final),
    recipe_repr=repr(final),
    recipe_hash=final.hash,
    seed=3,
    status="finished",
    error=None,
    data={"source": "cifar10", "hash": "0123456789abcdef", "train": 50_000, "test": 10_000},
    device={"kind": "cpu", "platform": "cpu", "count": 1, "cpu": "abacus", "cores": 2},
    versions={"python": "3.11"},
    source_hash="ab",
    conv="lax",
    driver="python",
    command=("run", "final"),
    started="2026-01-01T00:00:00+00:00",
    epochs=(EpochInfo(1, 3.5, 1.5, 0.5, 1.25, 0.75, 1.2, 0.76), EpochInfo(2, 4.0, 0.5, 0.75, 0.25, 0.9408, 0.2, 0.945)),
    result={
        "test_accuracy": 0.9408,
        "tta_accuracy": 0.945,
        "train_seconds": 9.0,
        "setup_seconds": 1.0,
        "transfer_seconds": 0.5,
        "compile_seconds": 20.0,
        "images_per_second": 1000.0,
    },
)


def with_changes(record, **changes):
    """A copy with fields replaced; a dict of `data` is merged into the record's own."""
    changes["data"] = {**record.data, **changes.get("data", {})}
    return dataclasses.replace(record, **changes)
