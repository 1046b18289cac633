"""`run` with --mesh and --distributed."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fastcifar_jax.runs import records, together

ROOT = Path(__file__).parents[2]
RUN = ("run", "trick.py", "--data", "tiny.npz")


def written(folder):
    return {record.seed: record for record in records.find(Path(folder)).values()}


def without_times(record):
    return [epoch._replace(train_seconds=0.0) for epoch in record.epochs]


@pytest.fixture
def alone(workplace, call, compiled_once):
    """Seeds 0, 1 and 2, one after another."""
    assert call(*RUN, "--seeds", "3", "--out", "alone")[0] == 0
    return written("alone")


def test_one_seed_after_another_over_a_mesh_is_bitwise_the_same(alone, call):
    assert call(*RUN, "--seeds", "3", "--mesh", "1x1")[0] == 0
    found = written("runs")
    assert {seed: without_times(found[seed]) for seed in found} == {s: without_times(alone[s]) for s in alone}
    status, out, _ = call(*RUN, "--seeds", "4", "--mesh", "1")
    assert status == 0 and "3 skipped" in out and "   seed 3\n" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--mesh", "two"), "'two' is not a mesh"),
        (("--mesh", "2x2x2"), "'2x2x2' is not a mesh"),
        (("--mesh", "64"), "a mesh of seed 64 x batch 1 does not fit"),
        (("--mesh", "0"), "a mesh of seed 0 x batch 1 does not fit"),
        (("--mesh", "1", "--save"), "--save cannot be combined with --mesh"),
    ],
)
def test_refused(workplace, call, arguments, message):
    status, _, err = call(*RUN, *arguments)
    assert status == 2 and message in err and err.count("\n") == 1 and not Path("runs").exists()


def test_a_crash_is_on_record_and_a_refusal_is_not(workplace, call, loaded, monkeypatch):
    def fake(error):
        def train_seeds(*args, **options):
            raise error
            yield

        monkeypatch.setattr(together, "train_seeds", train_seeds)

    fake(ValueError("no such split"))
    status, _, err = call(*RUN, "--seeds", "2", "--mesh", "1")
    assert status == 2 and err == "error: trick: no such split\n" and written("runs") == {}
    fake(RuntimeError("the cat sat"))
    with pytest.raises(RuntimeError, match="the cat sat"):
        call(*RUN, "--seeds", "2", "--mesh", "1")
    assert [(r.seed, r.status, r.error) for r in written("runs").values()] == [
        (0, "crashed", "RuntimeError: the cat sat")
    ]


def test_two_processes(alone, workplace):
    """Process 0 knows that seed 1 is on record, writes the others, and is the only one that prints."""
    for path in Path("alone").glob("*/*-seed1.*"):
        target = Path("first") / path.relative_to("alone")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2"}
    environment["PYTHONPATH"] = str(ROOT)
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "fastcifar_jax", *RUN, "--seeds", "3", "--distributed", "--out", out],
            env={**environment, "JAX_PROCESS_ID": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i, out in enumerate(("first", "second"))
    ]
    (out, err), (silence, other_err) = [child.communicate(timeout=240) for child in children]
    assert [child.returncode for child in children] == [0, 0], err + other_err
    assert "seed 1: test" in out and "on record" in out and "3 of 3 seeds: 3 finished" in out
    assert [line for line in silence.splitlines() if not line.startswith("[Gloo]")] == []
    found = written("first")
    assert {seed: without_times(found[seed]) for seed in found} == {s: without_times(alone[s]) for s in alone}
    assert [found[seed].provenance.mesh for seed in range(3)] == ["2x1", "1x1", "2x1"]
    assert not Path("second").exists()


def test_distributed_without_others(workplace):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    command = [sys.executable, "-m", "fastcifar_jax", *RUN, "--distributed"]
    done = subprocess.run(
        command, env={**environment, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and "set JAX_COORDINATOR_ADDRESS=host:port" in done.stderr and not Path("runs").exists()
