"""The state of a run at the end of an epoch as one file, from which a killed run goes on bit for bit.

A safetensors file holds every leaf of the `TrainState` by its tree path, and as metadata the epoch table and what made
the state. Nothing in it is executed. A state is gone on with only by what would have made it again: the same recipe,
source, data, seed, driver, convolution, device, versions and settings.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from fastcifar_jax.runs import records
from fastcifar_jax.runs.records import Record
from fastcifar_jax.types import EpochInfo, Snapshot, TrainState, flatten_by_path

FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or gone on with; the message names the file and why."""


def path_of(record: Path) -> Path:
    """Where the state of a run is kept: beside its record."""
    return record.with_suffix(".checkpoint")


def save(path: Path, snapshot: Snapshot, record: Record) -> None:
    """Writes a checkpoint whole or not at all.

    Args:
      path: what is there is replaced.
      snapshot: is copied to the host.
      record: of the run, as it is known before it starts.

    Raises:
      CheckpointError: it cannot be written; what was there before is still there.
    """
    leaves = {name: np.array(leaf, order="C") for name, leaf in flatten_by_path(snapshot.state).items()}
    about = {
        "made by": _made_by(record),
        "epochs": [row._asdict() for row in snapshot.epochs],
        "setup_seconds": snapshot.setup_seconds,
    }
    text = json.dumps(about)
    metadata = {"format": str(FORMAT), "sha256": _digest(text, leaves), "run": text}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        records.write_whole({path: safetensors.numpy.save(leaves, metadata)})
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error


def load(path: Path, record: Record, like: TrainState) -> Snapshot | None:
    """What `save` wrote, on the default device; None where there is no file.

    Args:
      path: of the checkpoint.
      record: of the run that would go on, as it is known before it starts.
      like: the structure, shapes and dtypes of the state.

    Raises:
      CheckpointError: the file is damaged, or of a run that was made otherwise.
    """
    if not os.path.lexists(path):
        return None
    try:
        with safetensors.safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            leaves = {name: file.get_tensor(name) for name in file.keys()}
        if metadata.get("format") != str(FORMAT):
            raise CheckpointError(f"{path} has format {metadata.get('format')}; expected {FORMAT}")
        if metadata["sha256"] != _digest(metadata["run"], leaves):
            raise ValueError("its checksum is wrong")
        about = json.loads(metadata["run"])
        _check_made_alike(path, about["made by"], _made_by(record))
        epochs = tuple(EpochInfo(**row) for row in about["epochs"])
        return Snapshot(_state(leaves, like), epochs, about["setup_seconds"])
    except CheckpointError:
        raise
    except (OSError, safetensors.SafetensorError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def remove(path: Path) -> None:
    """Deletes a checkpoint; one that is not there, or has to stay, does no harm."""
    with contextlib.suppress(OSError):
        path.unlink()


def keep(
    path: Path, record: Record, like: Callable[[], TrainState], say: Callable[[str], None]
) -> tuple[Snapshot | None, Callable[[Snapshot], None]]:
    """The arguments `resume` and `on_snapshot` of a training function. A fault is said and costs no run.

    Args:
      path: of the checkpoint.
      record: of the run, as it is known before it starts.
      like: gives the structure of the state; called where there is a checkpoint.
      say: shows a line.
    """

    def on_snapshot(snapshot: Snapshot) -> None:
        try:
            save(path, snapshot, record)
        except CheckpointError as error:
            say(f"warning: no checkpoint of epoch {len(snapshot.epochs)}: {error}; training goes on")

    resume = None
    if os.path.lexists(path):
        try:
            resume = load(path, record, like())
        except CheckpointError as error:
            say(f"warning: {error}; starting from the beginning")
    if resume is not None:
        say(f"going on after epoch {len(resume.epochs)}, from {path}")
    return resume, on_snapshot


def _state(leaves: dict[str, np.ndarray], like: TrainState) -> TrainState:
    """The leaves in the structure of `like`.

    Raises:
      ValueError: they do not fit it.
    """
    wanted = flatten_by_path(like)
    if wrong := sorted(wanted.keys() ^ leaves.keys()):
        raise ValueError(f"it holds other arrays than the run needs, {wrong[0]} to begin with")
    for name, leaf in wanted.items():
        found = leaves[name]
        if (found.shape, found.dtype) != (leaf.shape, leaf.dtype):
            raise ValueError(f"{name} is {found.dtype}{found.shape}; expected {leaf.dtype}{leaf.shape}")
    # A copy, since an array that shares NumPy's memory must not be donated.
    return jax.tree.unflatten(jax.tree.structure(like), [jnp.array(leaves[name], copy=True) for name in wanted])


def _made_by(record: Record) -> dict[str, Any]:
    """Everything that the numbers of a run depend on."""
    data = {name: record.data[name] for name in ("hash", "train", "test")}
    parts = {"data": data, "device": record.device, "versions": record.versions, "settings": _settings()}
    return {
        "recipe": record.recipe_hash,
        "source code": record.source_hash,
        "seed": record.seed,
        "driver": record.driver,
        "conv": record.conv,
        **{f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()},
    }


def _settings() -> dict[str, Any]:
    """What changes the numbers from outside the recipe."""
    options = ("jax_enable_x64", "jax_default_prng_impl", "jax_threefry_partitionable", "jax_default_matmul_precision")
    return {
        **{name: getattr(jax.config, name, None) for name in options},
        **{name: os.environ.get(name) for name in ("XLA_FLAGS", "ONEDNN_MAX_CPU_ISA")},
    }


def _check_made_alike(path: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    differs = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if differs:
        texts = [f"{name} was {old.get(name)!s:.40} and is {new.get(name)!s:.40}" for name in differs]
        raise CheckpointError(f"{path} was made otherwise: {', '.join(texts)}")


def _digest(text: str, leaves: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(leaves):
        leaf = leaves[name]
        digest.update(f"{name} {leaf.dtype} {leaf.shape}\n".encode())
        digest.update(leaf.tobytes())
    return digest.hexdigest()
