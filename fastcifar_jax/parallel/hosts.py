"""The processes of a run on several hosts: joining them, and checking that they agree."""

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from fastcifar_jax.types import Dataset

HEARTBEAT_SECONDS = 60  # without a heartbeat, after which a process counts as dead


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat_seconds: int = HEARTBEAT_SECONDS,
) -> None:
    """Joins the processes of several hosts into one run; call it before anything asks JAX for a device.

    Arguments that are None come from the environment variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID, or else from JAX's detection of Slurm, Open MPI, Kubernetes and Cloud TPU. On CPUs the processes
    communicate through gloo.

    If a process dies, the others end with an error within `heartbeat_seconds`. A process that hangs is not detected
    (jax issue 38503).

    Args:
      coordinator_address: host and port of process 0, "10.0.0.1:1234".
      num_processes: in the whole run.
      process_id: 0 .. num_processes - 1.
      heartbeat_seconds: also how long a process waits at its end for the others. All have 300 s to start.

    Raises:
      ValueError: no cluster is found and the arguments do not describe one.
      RuntimeError: JAX has started a device already, or the other processes do not answer.
    """
    given: dict[str, Any] = {
        "coordinator_address": coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS"),
        "num_processes": _number(num_processes, "JAX_NUM_PROCESSES"),
        "process_id": _number(process_id, "JAX_PROCESS_ID"),
    }
    detection = None if None in given.values() else "deactivate"
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            **given,
            cluster_detection_method=detection,
            heartbeat_timeout_seconds=heartbeat_seconds,
            shutdown_timeout_seconds=heartbeat_seconds,
        )
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"cannot join the processes of a run: {error} Known: {given}. Start this under Slurm, Open MPI, Kubernetes "
            "or Cloud TPU, or set JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from error


def _number(value: int | None, variable: str) -> int | None:
    text = os.environ.get(variable)
    if value is not None or not text:
        return value
    if not text.isdecimal():
        raise ValueError(f"{variable} is {text!r}; give a number >= 0")
    return int(text)


def writes_records() -> bool:
    """Whether this is process 0, the only one that writes to disk and to the terminal."""
    return jax.process_index() == 0


def from_process_0(values: Sequence[int]) -> list[int]:
    """The `values` of process 0, on every process.

    Args:
      values: of the same length on every process, 0 <= value < 2**31.
    """
    return multihost_utils.broadcast_one_to_all(np.array(values, np.int32)).tolist()


def gather(value: Any) -> list[Any]:
    """The JSON values of all processes, in their order; numbers are preserved exactly."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array(len(text), np.int32))
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(text)] = text
    texts = multihost_utils.process_allgather(padded)
    return [json.loads(row[:length].tobytes()) for row, length in zip(texts, lengths.ravel(), strict=True)]


def require_agreement(what: tuple, dataset: Dataset) -> None:
    """Checks that all processes compile the same programs for the same data; else they would wait forever.

    Raises:
      ValueError: they do not; raised on every process.
    """
    if jax.process_count() == 1:
        return
    digest = hashlib.sha256(repr((what, jax.__version__)).encode())
    for array in dataset:
        digest.update(np.asarray(array).tobytes())
    digests = multihost_utils.process_allgather(np.frombuffer(digest.digest(), np.uint32))
    others = [i for i, other in enumerate(digests) if (other != digests[0]).any()]
    if others:
        raise ValueError(
            f"processes {others} would run something else than process 0; give all the same command, data, packages "
            "and kind of processor (or set FASTCIFAR_CONV=lax on all)"
        )
