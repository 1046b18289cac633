"""The state of a run after an epoch in one file, from which a killed run continues bit for bit.

A safetensors file with every leaf of the `TrainState` by its tree path, and the rest of the `Snapshot` and the
provenance as metadata. Nothing in it is executed. Only the same run continues from it: the same recipe, seed and
provenance, except that the data may have moved.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from fastcifar_jax.runs.files import write_whole
from fastcifar_jax.runs.provenance import Provenance
from fastcifar_jax.runs.records import Record
from fastcifar_jax.types import EpochInfo, Snapshot, TrainState, flatten_by_path

SUFFIX = ".checkpoint"  # beside the record


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or used; the message names the file and the reason."""


def save_checkpoint(path: Path, snapshot: Snapshot, record: Record) -> None:
    """Writes a checkpoint whole or not at all.

    Args:
      path: is replaced if it exists.
      snapshot: is copied to the host.
      record: of the run, as known before it starts.

    Raises:
      CheckpointError: it cannot be written; an earlier checkpoint is unchanged.
    """
    leaves = {name: np.array(leaf, order="C") for name, leaf in flatten_by_path(snapshot.state).items()}
    run = {"recipe": record.recipe_hash, "seed": record.seed, "provenance": record.provenance.to_dict()}
    rest = {name: value for name, value in snapshot._asdict().items() if name != "state"}
    text = json.dumps({**run, "snapshot": {**rest, "epochs": [row._asdict() for row in snapshot.epochs]}})
    metadata = {"sha256": _digest(text, leaves), "run": text}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole({path: safetensors.numpy.save(leaves, metadata)})
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error


def load_checkpoint(path: Path, record: Record, like: TrainState) -> Snapshot | None:
    """What `save_checkpoint` wrote, on the default device; None if there is no file.

    Args:
      path: of the checkpoint.
      record: of the run that would continue, as known before it starts.
      like: structure, shapes and dtypes of the state.

    Raises:
      CheckpointError: the file is damaged or from a different run.
    """
    if not os.path.lexists(path):
        return None
    try:
        with safetensors.safe_open(path, framework="np") as file:
            metadata = file.metadata()
            leaves = {name: file.get_tensor(name) for name in file.keys()}
        if metadata["sha256"] != _digest(metadata["run"], leaves):
            raise ValueError("its checksum is wrong")
        run = json.loads(metadata["run"])
        if differences := _differences(run, record):
            raise CheckpointError(f"{path} is from a different run: {', '.join(differences)}")
        rest = {**run["snapshot"], "epochs": tuple(EpochInfo(**row) for row in run["snapshot"]["epochs"])}
        return Snapshot(_restore(leaves, like), **rest)
    except CheckpointError:
        raise
    except (OSError, safetensors.SafetensorError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def _differences(run: dict[str, Any], record: Record) -> list[str]:
    pairs = {"recipe": (run["recipe"], record.recipe_hash), "seed": (run["seed"], record.seed)}
    pairs |= Provenance.from_dict(run["provenance"]).diff(record.provenance)
    return [
        f"{name} was {old!s:.40} and is {new!s:.40}"
        for name, (old, new) in pairs.items()
        if old != new and name != "data.source"
    ]


def _restore(leaves: dict[str, np.ndarray], like: TrainState) -> TrainState:
    """The leaves in the structure of `like`.

    Raises:
      ValueError: they do not fit it.
    """
    wanted = flatten_by_path(like)
    if wrong := sorted(wanted.keys() ^ leaves.keys()):
        raise ValueError(f"its arrays are not those of the run, starting with {wrong[0]}")
    for name, leaf in wanted.items():
        found = leaves[name]
        if (found.shape, found.dtype) != (leaf.shape, leaf.dtype):
            raise ValueError(f"{name} is {found.dtype}{found.shape}; expected {leaf.dtype}{leaf.shape}")
    # A copy, since an array that shares NumPy's memory must not be donated.
    return jax.tree.unflatten(jax.tree.structure(like), [jnp.array(leaves[name], copy=True) for name in wanted])


def _digest(text: str, leaves: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(leaves):
        leaf = leaves[name]
        digest.update(f"{name} {leaf.dtype} {leaf.shape}\n".encode())
        digest.update(leaf.tobytes())
    return digest.hexdigest()
