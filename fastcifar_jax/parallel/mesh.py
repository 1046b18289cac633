"""Devices as rows: each row trains one seed at a time and shares its batches."""

import contextlib
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


def make_mesh(seed: int | None = None, batch: int = 1) -> Mesh:
    """A mesh with the axes `seed` and `batch` over the devices of all processes.

    Args:
      seed: seeds that train at the same time; None for as many as the devices allow.
      batch: devices that share the batches of one seed. They are neighbours, on one host or on all.

    Raises:
      ValueError: more devices than there are; with several processes, idle devices or rows on some of the processes.
    """
    count, processes = jax.device_count(), jax.process_count()
    seed = count // batch if seed is None and batch > 0 else seed
    if batch < 1 or not seed or seed < 1 or seed * batch > count:
        raise ValueError(f"a mesh of seed {seed} x batch {batch} does not fit {count} devices; seed * batch <= {count}")
    if processes > 1 and seed * batch != count:
        raise ValueError(
            f"a mesh of seed {seed} x batch {batch} leaves some of the {count} devices of {processes} processes idle; "
            f"choose seed * batch = {count}"
        )
    if seed > 1 and jax.local_device_count() % batch:
        raise ValueError(
            f"a mesh of seed {seed} x batch {batch} spreads the batches of one seed over some of the {processes} "
            f"processes; choose a batch that divides {jax.local_device_count()}, or 1x{count}"
        )
    # Not jax.make_mesh, which refuses devices of several slices, as GPUs of several hosts are to it.
    return Mesh(np.array(jax.devices()[: seed * batch]).reshape(seed, batch), ("seed", "batch"))


@contextlib.contextmanager
def row_of_devices(devices: np.ndarray):
    """Computes on a row of a mesh: on its only device, or on all of them with batches shared along the axis "batch".

    Yields:
      The placement of an array that the whole row has, for `place`.
    """
    if len(devices) == 1:
        with jax.default_device(devices[0]):
            yield devices[0]
        return
    mesh = Mesh(devices, ("batch",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        yield NamedSharding(mesh, P())


def place(tree: Any, placement: jax.Device | NamedSharding) -> Any:
    """Arrays that every process has, on a device or on every device of a row."""
    if isinstance(placement, jax.Device) or placement.is_fully_addressable:
        return jax.device_put(tree, placement)
    host = jax.tree.map(np.asarray, tree)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, placement, lambda i: x[i]), host)
