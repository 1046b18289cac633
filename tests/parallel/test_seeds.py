"""Many seeds, devices and processes against one device; see tests/distributed_worker.py for what they run."""

import functools
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading

import chex
import jax
import numpy as np
import pytest

from fastcifar_jax.functions import over_devices
from fastcifar_jax.parallel import hosts
from fastcifar_jax.parallel import seeds as seeds_module
from fastcifar_jax.parallel.mesh import make_mesh
from fastcifar_jax.parallel.seeds import train_seeds
from fastcifar_jax.train import Diverged, make_train
from fastcifar_jax.types import EpochInfo
from tests.helpers_train import DATASET, linear, numbers
from tests.parallel import distributed_worker as worker

BOUND = 60  # seconds in which a process must have ended that another left alone; its heartbeat is 10
START = 300  # seconds for the rest of a child's life
CHILDREN = []


def start(job, out, *arguments, devices=1):
    """A child process that runs `job`."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "1", "FASTCIFAR_CONV": "lax"}
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    command = [sys.executable, worker.__file__, job, str(out), *map(str, arguments)]
    CHILDREN.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    return CHILDREN[-1]


def end(process, seconds):
    """Status and standard error of a child, which is killed after `seconds`."""
    try:
        _, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        _, errors = process.communicate()
        pytest.fail(f"{process.args[2:]} still ran after {seconds} s:\n{errors[-3000:]}")
    return process.returncode, errors


def start_pair(job, out):
    """Two child processes of one run."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    return [start(job, out, i, port) for i in range(2)]


def found_by(processes, out):
    for status, errors in [end(process, START) for process in processes]:
        assert status == 0, errors[-3000:]
    return pickle.loads(out.read_bytes())


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """`found(job)`: what the processes of a job found, each job once."""

    @functools.cache
    def found(job):
        out = tmp_path_factory.mktemp(job) / "found"
        started = start_pair(job, out) if job == "processes" else [start(job, out, devices=4)]
        return found_by(started, out)

    yield found
    for child in CHILDREN:
        with child:  # waits, and closes its pipe
            child.kill()


def test_a_diverged_seed_ends_no_other():
    news = list(train_seeds(linear(coin=True), 4, range(6), DATASET, make_mesh(1, 1)))
    found = dict(news)
    bad = [seed for seed, outcome in found.items() if isinstance(outcome, Diverged)]
    assert 0 < len(bad) < 6 and list(found) == list(range(6))
    epochs = [(seed, item.epoch) for seed, item in news if isinstance(item, EpochInfo)]
    assert epochs == [(seed, epoch) for seed in range(6) if seed not in bad for epoch in (1, 2)]
    assert all(len(found[seed].epochs) == 1 for seed in bad)
    train = make_train(linear(), 4)
    good = [seed for seed in range(6) if seed not in bad]
    for seed in good:
        assert numbers(found[seed]) == numbers(train(jax.random.key(seed), DATASET))
    assert [found[seed].compile_seconds > 0 for seed in good] == [seed == 0 for seed in good]


def test_a_run_that_is_not_wanted_any_more_stops():
    """Closing the iterator ends the threads after their current epochs."""
    events = train_seeds(linear(10**6), 4, [0], DATASET, make_mesh(1, 1))
    assert next(events)[1].epoch == 1
    before = threading.active_count()
    events.close()
    assert threading.active_count() == before - 1


def test_a_crash_is_raised(monkeypatch):
    def crash(*args, **options):
        raise RuntimeError("the cat sat")
        yield

    monkeypatch.setattr(seeds_module, "train_epochs", crash)
    with pytest.raises(RuntimeError, match="the cat sat"):
        list(train_seeds(linear(), 4, [0], DATASET, make_mesh(1, 1)))


def test_errors_say_what_to_do(monkeypatch):
    with pytest.raises(ValueError, match=r"seed 2 x batch 1 does not fit 1 devices"):
        make_mesh(2)
    with pytest.raises(ValueError, match=r"batch 4 does not fit"):
        make_mesh(batch=4)
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(ValueError, match="JAX_NUM_PROCESSES is 'two'"):
        hosts.initialize()
    mesh = jax.sharding.AbstractMesh((3,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.sharding.use_abstract_mesh(mesh), pytest.raises(ValueError, match="make batch_size a multiple of 3"):
        over_devices(np.zeros((32, 1, 1, 1)))


def assert_same(found, expected):
    """Bit for bit, as far as a state is here."""
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert numbers(a) == numbers(b)
        if a.state is not None:
            chex.assert_trees_all_equal(a.state, b.state)


def assert_close(found, expected):
    """Up to rounding in float64, which nine steps have carried on."""
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(*(np.array(numbers(run), float) for run in (a, b)), rtol=1e-9)
        chex.assert_trees_all_close(a.state, b.state, rtol=1e-8, atol=1e-9)


def test_seeds_over_devices_are_bitwise_those_of_one_device(found):
    assert_same(found("devices")["seed"], found("devices")["alone"])


def test_batches_over_devices_give_the_numbers_of_one_device(found):
    """Two rows of two devices, in float32."""
    for a, b in zip(found("devices")["batch"], found("devices")["alone"], strict=True):
        np.testing.assert_allclose(*(np.array(numbers(run), float) for run in (a, b)), rtol=1e-5)
        chex.assert_trees_all_close(a.state, b.state, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["ghost", "plain"])
def test_batches_of_a_network_over_devices_give_the_numbers_of_one_device(found, norm):
    """Ghost groups that two devices share, and batch norm over four."""
    assert_close(found("networks")[norm], found("networks")[f"{norm} alone"])


@pytest.mark.slow
def test_seeds_over_processes_are_bitwise_those_of_one_device(found):
    processes = found("processes")
    assert_same(processes["seed"], processes["alone"])
    assert [run.state is None for run in processes["seed"]] == [False, True, False]


@pytest.mark.slow
def test_a_batch_over_processes_gives_the_numbers_of_one_device(found):
    assert_close(found("processes")["batch"], found("processes")["alone"][:1])


@pytest.mark.slow
def test_processes_do_what_process_0_is_to_do(found):
    assert found("processes")["from_process_0"] == [0, 7]
    assert found("processes")["disagreement"].startswith("processes [1] would run something else than process 0")


@pytest.mark.slow
def test_a_process_that_is_left_alone_ends_with_an_error(tmp_path):
    """Either process is killed, or process 1 leaves with an exception."""
    victims = {"killed0": 0, "killed1": 1, "raising": 1}
    children = {job: start_pair(job, tmp_path / "found") for job in victims}
    for job, victim in victims.items():
        status, errors = end(children[job][victim], START)
        assert status == -signal.SIGKILL if job.startswith("killed") else "RuntimeError: no more" in errors, errors
        status, errors = end(children[job][1 - victim], BOUND)
        assert status != 0 and errors.strip()
    assert not (tmp_path / "found").exists()
