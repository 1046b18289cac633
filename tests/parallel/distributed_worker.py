"""One process of the runs that test_seeds.py compares: `python tests/parallel/distributed_worker.py JOB OUT [ID PORT]`.

A process of its own, because the number of devices and of processes is fixed when JAX starts.
"""

import os
import pickle
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).parents[2]))

from experiments.bag_of_tricks import final
from fastcifar_jax.augment import Flip
from fastcifar_jax.parallel import hosts
from fastcifar_jax.parallel.mesh import make_mesh
from fastcifar_jax.parallel.seeds import train_seeds
from fastcifar_jax.train import make_train
from fastcifar_jax.types import EpochInfo
from tests.helpers_train import linear, make_dataset, small

HEARTBEAT_SECONDS = 10
SEEDS = [0, 1, 2, 3, 4]
GHOST = small(final, compute_dtype="float64", augmentations=(Flip(),))
GHOST = replace(GHOST, model=replace(GHOST.model, res_layers=()))  # each would take a second more to compile
PLAIN = replace(GHOST, model=replace(GHOST.model, norm=replace(GHOST.model.norm, num_groups=1)))


def alone(recipe, seeds):
    """One after another on one device of this process: another number of devices or threads rounds differently."""
    train, data = make_train(recipe, 4), make_dataset()
    return [jax.device_get(train(jax.random.key(seed), data)) for seed in seeds]


def outcomes(recipe, mesh, seeds):
    """The outcomes in the order of the seeds, their states on the host."""
    found = dict(train_seeds(recipe, 4, seeds, make_dataset(), mesh))  # the last news of each seed
    return [jax.device_get(found[seed]) for seed in seeds]


def devices():
    """Four devices in one process."""
    return {
        "alone": alone(linear(), SEEDS),
        "seed": outcomes(linear(), make_mesh(2, 1), SEEDS),
        "batch": outcomes(linear(), make_mesh(2, 2), SEEDS),
    }


def networks():
    """Real networks with ghost batch norm and without, on four devices."""
    return {
        "plain alone": alone(PLAIN, SEEDS[:1]),
        "plain": outcomes(PLAIN, make_mesh(1, 4), SEEDS[:1]),
        "ghost alone": alone(GHOST, SEEDS[:3]),
        "ghost": outcomes(GHOST, make_mesh(2, 2), SEEDS[:3]),
    }


def processes():
    """One device in each of two processes."""
    found = {"from_process_0": hosts.from_process_0([jax.process_index(), 7])}
    found["alone"] = alone(GHOST, SEEDS[:3]) if hosts.writes_records() else None
    found["seed"] = outcomes(GHOST, make_mesh(), SEEDS[:3])
    found["batch"] = outcomes(GHOST, make_mesh(batch=2), SEEDS[:1])
    try:
        outcomes(GHOST, make_mesh(), [jax.process_index()])
    except ValueError as error:
        found["disagreement"] = str(error)
    return found


def linear_run(after_epoch):
    """Epochs until something happens, with a sum over both processes in every step."""
    for _, news in train_seeds(linear(10**6), 4, SEEDS[:1], make_dataset(), make_mesh(batch=2)):
        if isinstance(news, EpochInfo):
            after_epoch(news.epoch)


def killed(victim):
    """Process `victim` is killed after its third epoch."""

    def after_epoch(epoch):
        if epoch == 3 and jax.process_index() == victim:
            os.kill(os.getpid(), signal.SIGKILL)

    linear_run(after_epoch)


def raising():
    """Process 1 leaves with an exception after its third epoch."""

    def after_epoch(epoch):
        if epoch == 3 and jax.process_index() == 1:
            raise RuntimeError("no more")

    linear_run(after_epoch)


def main(job, out, process_id=None, port=None):
    jax.config.update("jax_default_prng_impl", "rbg")  # the default's bits take XLA five times longer to compile
    if process_id is not None:
        hosts.initialize(f"localhost:{port}", 2, int(process_id), heartbeat_seconds=HEARTBEAT_SECONDS)
    jobs = {"killed0": lambda: killed(0), "killed1": lambda: killed(1)}
    jobs.update({f.__name__: f for f in (devices, networks, processes, raising)})
    start = time.perf_counter()
    found = jobs[job]()
    print(f"{job} {process_id}: {time.perf_counter() - start:.1f} s", file=sys.stderr)
    if hosts.writes_records():
        Path(out).write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
