"""Many seeds, devices and processes against one device; see tests/distributed_worker.py for what they run."""

import os
import pickle
import signal
import socket
import subprocess
import sys
from dataclasses import replace

import chex
import jax
import numpy as np
import pytest

from fastcifar_jax.ops.batch_norm import share_of_batch
from fastcifar_jax.parallel import hosts, seeds
from fastcifar_jax.parallel.mesh import make_mesh
from fastcifar_jax.train import Diverged
from tests.helpers_train import DATASET, numbers
from tests.parallel import distributed_worker as worker

BOUND = 60  # seconds in which a process must have ended that another left alone; its heartbeat is 10
START = 300  # seconds for the rest of a child's life
CHILDREN = []


@pytest.fixture(scope="module", autouse=True)
def quickly_compiled():
    """Keys whose bits compile in a fifth of the time, for this file alone."""
    with jax.default_prng_impl("rbg"):
        yield


def start(job, out, *arguments, devices=1):
    """A child process that runs `job`."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "1", "FASTCIFAR_CONV": "lax"}
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    command = [sys.executable, worker.__file__, job, str(out), *map(str, arguments)]
    CHILDREN.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    return CHILDREN[-1]


def end(process, seconds):
    """Status and standard error of a child, which is killed after so many seconds."""
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


@pytest.fixture(autouse=True, scope="module")
def children(tmp_path_factory):
    """The long jobs, which run beside the tests of this process: `job -> (processes, file of what they found)`."""
    outs = {job: tmp_path_factory.mktemp(job) / "found" for job in ("devices", "processes")}
    started = {"devices": [start("devices", outs["devices"], devices=4)]}
    started["processes"] = start_pair("processes", outs["processes"])
    yield {job: (started[job], outs[job]) for job in outs}
    for child in CHILDREN:
        with child:  # waits, and closes its pipe
            child.kill()


def found_by(processes, out):
    for status, errors in [end(process, START) for process in processes]:
        assert status == 0, errors[-3000:]
    return pickle.loads(out.read_bytes())


@pytest.fixture(scope="module")
def devices(children):
    """What one process with four devices found."""
    return found_by(*children["devices"])


@pytest.fixture(scope="module")
def processes(children):
    """What two processes with one device each found."""
    return found_by(*children["processes"])


def linear_recipe(coin, num_epochs=2):
    return replace(worker.linear(num_epochs), model=worker.Linear(coin))


@pytest.mark.parametrize("strategy, driver", [("loop", "python"), ("map", "scan"), ("vmap", "python")])
def test_a_diverged_seed_takes_no_other_down(strategy, driver):
    ended, epochs, compiled = [], [], []
    train = seeds.make_train_seeds(linear_recipe(coin=True), 4, strategy, driver=driver)
    found = train(
        range(6),
        DATASET,
        lambda seed, outcome: ended.append((seed, outcome)),
        lambda seed, info: epochs.append((seed, info.epoch)),
        compiled.append,
    )
    bad = [seed for seed, outcome in enumerate(found) if isinstance(outcome, Diverged)]
    assert 0 < len(bad) < 6
    assert {seed: outcome for seed, outcome in ended} == dict(enumerate(found)) and len(ended) == 6
    assert sorted(epochs) == [(seed, epoch) for seed in range(6) if seed not in bad for epoch in (1, 2)]
    assert all(len(found[seed].epochs) == 1 for seed in bad)
    expected = seeds.make_train_seeds(linear_recipe(coin=False), 4, driver=driver)(range(6), DATASET)
    for seed in set(range(6)) - set(bad):
        np.testing.assert_allclose(numbers(found[seed]), numbers(expected[seed]), rtol=1e-5)
    assert compiled[0] > 0 and not any(compiled[1:])


def test_seeds_in_several_groups():
    """Five seeds, two at once: the last group is filled up, and compiled for once."""
    compiled = []
    train = seeds.make_train_seeds(linear_recipe(coin=False), 4, "vmap", driver="python", at_once=2, keep_states=False)
    found = train(range(5), DATASET, on_compiled=compiled.append)
    expected = seeds.make_train_seeds(linear_recipe(coin=False), 4, keep_states=False)(range(5), DATASET)
    assert {run.state for run in found + expected} == {None}
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(numbers(a), numbers(b), rtol=1e-5)
    assert len(compiled) == 3 and compiled[0] > 0 and compiled[1:] == [0, 0]


def test_all_seeds_diverged_end_early():
    recipe = linear_recipe(coin=False, num_epochs=3)
    recipe = replace(recipe, optim=replace(recipe.optim, peak_lr=1e38))
    found = seeds.make_train_seeds(recipe, 4, "vmap")([0, 1], DATASET)
    assert [type(outcome) for outcome in found] == [Diverged] * 2
    assert "diverged in epoch 1" in str(found[0])


@pytest.mark.parametrize("num_groups, devices", [(4, 2), (4, 4), (1, 4), (6, 4), (2, 1)])
def test_a_share_keeps_images_in_their_groups(num_groups, devices):
    """Images are numbers; where groups are whole, device d holds the d-th run of them."""
    batch = np.arange(48, dtype=np.int32)
    shares = jax.vmap(lambda _: share_of_batch(batch, num_groups, "batch"), axis_name="batch")(np.arange(devices))
    shares = np.asarray(shares)
    assert sorted(shares.ravel()) == batch.tolist()
    whole = num_groups % devices == 0
    for d, share in enumerate(shares):
        here = num_groups // devices if whole else num_groups
        for n, image in enumerate(share):
            assert image % num_groups == n % here + (d * here if whole else 0)


def test_a_batch_that_cannot_be_split():
    share = jax.vmap(lambda _: share_of_batch(np.arange(30), 6, "batch"), axis_name="batch")
    with pytest.raises(ValueError, match="30 images in 6 ghost groups .* 4 devices; make batch_size a multiple of 24"):
        share(np.arange(4))


def test_errors_say_what_to_do(monkeypatch):
    recipe = linear_recipe(coin=False)
    with pytest.raises(ValueError, match="strategy is 'pmap'; choose one of loop, map, vmap"):
        seeds.make_train_seeds(recipe, 4, "pmap")
    with pytest.raises(ValueError, match="at_once is 0"):
        seeds.make_train_seeds(recipe, 4, "vmap", at_once=0)
    with pytest.raises(ValueError, match=r"seed 2 x batch 1 does not fit 1 devices"):
        make_mesh(2)
    with pytest.raises(ValueError, match=r"batch 4 does not fit"):
        make_mesh(batch=4)
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(ValueError, match="JAX_NUM_PROCESSES is 'two'"):
        hosts.initialize()


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
        np.testing.assert_allclose(numbers(a), numbers(b), rtol=1e-9)
        chex.assert_trees_all_close(a.state, b.state, rtol=1e-8, atol=1e-9)


def test_seeds_over_devices_are_bitwise_those_of_one_device(devices):
    assert_same(devices["linear"], devices["linear alone"])


def test_seeds_over_processes_are_bitwise_those_of_one_device(processes):
    assert_same(processes["seed"], processes["alone"])
    assert [run.state is None for run in processes["seed"]] == [False, True, False]


def test_batches_over_devices_give_the_numbers_of_one_device(devices):
    """Two seeds at once, two whole ghost groups a device; the running statistics keep their order."""
    assert_close(devices["ghost"], devices["ghost alone"])


def test_plain_batch_norm_is_synchronised_over_devices(devices):
    assert_close(devices["plain"], devices["plain alone"])


def test_a_batch_over_processes_gives_the_numbers_of_one_device(processes):
    assert_close(processes["batch"], processes["alone"][:1])


def test_processes_do_what_process_0_is_to_do(processes):
    assert processes["from_process_0"] == [0, 7]
    assert processes["disagreement"].startswith("processes [1] are to run something else than process 0")


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


@pytest.mark.parametrize("strategy", ["map", "vmap"])
def test_strategies_agree(strategy, devices):
    """With the loop, three seeds at once on one device."""
    found = devices[strategy]
    assert_close(found, devices["ghost alone"])
    assert found[0].compile_seconds > 0 == found[1].compile_seconds == found[2].compile_seconds
