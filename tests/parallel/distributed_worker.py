"""One process of the runs that tests/test_seeds.py compares: `python tests/distributed_worker.py JOB OUT [ID PORT]`.

A process of its own, because the number of devices and of processes is fixed when JAX starts.
"""

import dataclasses
import os
import pickle
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).parents[2]))

from fastcifar_jax.augment import Flip
from fastcifar_jax.models.base import Model
from fastcifar_jax.parallel import (
    hosts,
    seeds,
)
from fastcifar_jax.parallel.mesh import make_mesh
from fastcifar_jax.train import make_train

HEARTBEAT_SECONDS = 10
SEEDS = [0, 1, 2, 3, 4]


@dataclasses.dataclass(frozen=True)
class Linear:
    """Mean colours times a matrix: compiled in no time. A seed whose coin is heads starts from NaN."""

    coin: bool = False

    def with_width(self, width):
        return self

    def __call__(self, num_classes, compute_dtype):
        def init(key, images):
            heads = jax.random.bernoulli(key) & self.coin
            return {"params": {"w": jnp.full((3, num_classes), jnp.where(heads, jnp.nan, 0), "float32")}, **NOTHING}

        def apply(variables, images, train):
            return images.mean((1, 2)) @ variables["params"]["w"], {}

        model = Model(init, apply, lambda stats: stats, lambda variables, images: {"w": 3 * num_classes})
        return model._replace(split=lambda axis_name: model)  # no image knows of another


NOTHING = {"constants": {}, "batch_stats": {}}


def recipes():
    """Ghost batch norm in four groups, and in one; but for size, dtype, crops and residual pairs, `final`."""
    from experiments.bag_of_tricks import final
    from tests.test_train import small

    ghost = small(final, compute_dtype="float64", augmentations=(Flip(),))
    ghost = replace(ghost, model=replace(ghost.model, res_layers=()))  # each would take a second more to compile
    return ghost, replace(ghost, model=replace(ghost.model, norm=replace(ghost.model.norm, num_groups=1)))


def data():
    from tests.test_train import make_dataset

    return make_dataset(num_test=22)  # not a multiple of the devices


def alone(recipe, seeds_to_run):
    """One after another on one device of this process: another number of devices or threads rounds otherwise."""
    train = make_train(recipe, 4, driver="python")
    runs = [train(jax.random.key(seed), data()) for seed in seeds_to_run]
    return [run._replace(state=jax.device_get(run.state)) for run in runs]


def outcomes(recipe, mesh, seeds_to_run, strategy="loop"):
    return jax.device_get(seeds.make_train_seeds(recipe, 4, strategy, mesh, "python")(seeds_to_run, data()))


def devices():
    """Four devices in one process."""
    ghost, plain = recipes()
    return {
        "linear alone": alone(linear(), SEEDS),
        "linear": outcomes(linear(), make_mesh(2, 1), SEEDS),
        "plain alone": alone(plain, SEEDS[:1]),
        "plain": outcomes(plain, make_mesh(1, 4), SEEDS[:1]),
        "ghost alone": alone(ghost, SEEDS[:3]),
        "ghost": outcomes(ghost, make_mesh(2, 2), SEEDS[:3]),  # the second group is one seed twice
        "map": outcomes(ghost, None, SEEDS[:3], "map"),
        "vmap": outcomes(ghost, None, SEEDS[:3], "vmap"),
    }


def processes():
    """One device in each of two processes."""
    ghost, _ = recipes()
    found = {"from_process_0": hosts.from_process_0([jax.process_index(), 7])}
    found["alone"] = alone(ghost, SEEDS[:3]) if hosts.writes_records() else None
    found["seed"] = outcomes(ghost, make_mesh(), SEEDS[:3])
    found["batch"] = outcomes(ghost, make_mesh(batch=2), SEEDS[:1])
    try:
        outcomes(ghost, make_mesh(), [jax.process_index()])
    except ValueError as error:
        found["disagreement"] = str(error)
    return found


def linear(num_epochs=2):
    from experiments.bag_of_tricks import baseline
    from tests.test_train import small

    return replace(small(baseline, num_epochs), model=Linear(), augmentations=())


def linear_run(on_epoch):
    """Epochs until something happens, with a sum over both processes in every step."""
    train = seeds.make_train_seeds(linear(10**6), 4, mesh=make_mesh(batch=2), driver="python")
    train(SEEDS[:1], data(), on_epoch=lambda seed, row: on_epoch(row.epoch))


def killed(victim):
    """Process `victim` is killed after its third epoch."""

    def on_epoch(epoch):
        if epoch == 3 and jax.process_index() == victim:
            os.kill(os.getpid(), signal.SIGKILL)

    linear_run(on_epoch)


def raising():
    """Process 1 leaves with an exception after its third epoch."""

    def on_epoch(epoch):
        if epoch == 3 and jax.process_index() == 1:
            raise RuntimeError("no more")

    linear_run(on_epoch)


def main(job, out, process_id=None, port=None):
    jax.config.update("jax_default_prng_impl", "rbg")  # the default's bits take XLA five times longer to compile
    if process_id is not None:
        hosts.initialize(f"localhost:{port}", 2, int(process_id), heartbeat_seconds=HEARTBEAT_SECONDS)
    jobs = {"killed0": lambda: killed(0), "killed1": lambda: killed(1)}
    jobs.update({f.__name__: f for f in (devices, processes, raising)})
    start = time.perf_counter()
    found = jobs[job]()
    print(f"{job} {process_id}: {time.perf_counter() - start:.1f} s", file=sys.stderr)
    if hosts.writes_records():
        Path(out).write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
