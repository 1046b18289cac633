"""Faults around a run give one clear line and damage no record of a finished seed; killed runs continue."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from fastcifar_jax.data import load
from fastcifar_jax.runs import records, runner
from tests.helpers_runs import ARGUMENTS, leftovers, raises, records_of

resource = pytest.importorskip("resource", reason="needs the limits of POSIX")
ROOT = Path(__file__).parents[2]
LONG = (*ARGUMENTS, "--epochs", "100", "--seeds", "2")  # longer than a child runs ahead


@contextlib.contextmanager
def files_of_no_length():
    """No file of this process may have a byte: stands for a full disk where mounting one is not permitted."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def mount(*arguments):
    try:
        done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("needs the program mount")
    if done.returncode:
        pytest.skip(f"needs the right to mount: {done.stderr.strip()}")


@pytest.fixture
def small_disk(six_epochs):
    """The folder runs, on a disk of 256 KiB."""
    folder = Path("runs").absolute()
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder))
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_jax_starts_before_data_are_loaded(monkeypatch, loaded):
    """TensorFlow, which tensorflow-datasets may import, would take the memory of a GPU."""
    order, devices, load_data = [], jax.devices, load.load_data
    monkeypatch.setattr(jax, "devices", lambda *args: order.append("devices") or devices(*args))
    monkeypatch.setattr(load, "load_data", lambda *args, **options: order.append("data") or load_data(*args, **options))
    runner.load_data("cifar10", None)
    assert order[:2] == ["devices", "data"]


def test_full_disk(six_epochs, call):
    """A seed that finished before stays on record; the other one is trained to its end, reported, and not on record."""
    assert call(*ARGUMENTS)[0] == 0
    [finished] = Path("runs").rglob("*.json")
    before = finished.read_bytes()
    with files_of_no_length():
        status, out, err = call(*ARGUMENTS, "--seeds", "2")
        assert (status, err.count("\n")) == (1, 1)
        assert "seed1.json: File too large; make room or choose another --out" in err
        assert out.count("warning: no checkpoint of epoch") == 6
        assert ".checkpoint: File too large; training continues" in out
        assert "1 of 2 seeds: 1 finished" in out and leftovers() == []
        assert list(records_of()) == [finished.name]
    assert call(*ARGUMENTS, "--seeds", "2")[0] == 0
    assert len(records_of()) == 2 and finished.read_bytes() == before


def test_read_only_folder(small_disk, call, at_epoch):
    """From the beginning, and from the middle of a run, which then goes on from where it could last be saved."""
    read_only = lambda: mount("-o", "remount,ro", str(small_disk))
    read_only()
    status, out, err = call(*ARGUMENTS)
    assert (status, err.count("\n")) == (2, 1) and "cannot write records to runs" in err and "compiling" not in out
    mount("-o", "remount,rw", str(small_disk))
    at_epoch(2, read_only)
    status, out, err = call(*ARGUMENTS)
    assert (status, err.count("\n")) == (1, 1) and "seed0.json: Read-only file system" in err
    assert out.count("warning: no checkpoint of epoch") == 4
    mount("-o", "remount,rw", str(small_disk))
    status, out, _ = call(*ARGUMENTS)
    assert status == 0 and "continuing after epoch 2" in out and leftovers() == []


def test_file_in_the_place_of_a_folder(six_epochs, call, at_epoch):
    """Found before anything is trained; where it comes later, what was on record is as it was."""
    Path("other.py").write_text(Path("trick.py").read_text())
    Path("runs").mkdir()
    Path("runs/other").write_text("")
    status, out, err = call("run", "trick.py", "other.py", *ARGUMENTS[2:])
    assert (status, err.count("\n")) == (2, 1) and "cannot write records to runs/other" in err
    assert "compiling" not in out and records_of() == {}

    assert call(*ARGUMENTS)[0] == 0
    before = records_of()

    def replace_folder():
        os.rename("runs/trick", "moved")
        Path("runs/trick").write_text("mine")

    at_epoch(2, replace_folder)
    status, out, err = call(*ARGUMENTS, "--seeds", "2")
    assert (status, err.count("\n")) == (1, 1) and "seed1.json: File exists" in err
    assert out.count("warning: no checkpoint of epoch") == 4
    assert Path("runs/trick").read_text() == "mine" and records_of("moved") == before


def test_folder_deleted_in_the_middle_of_a_run(six_epochs, call, at_epoch):
    at_epoch(2, lambda: shutil.rmtree("runs"))
    status, _, err = call(*ARGUMENTS)
    assert (status, err) == (0, "") and len(records_of()) == 1 and leftovers() == []


def append(path):
    path.write_bytes(path.read_bytes() + b"# changed")


@pytest.mark.parametrize(
    ("damage", "message"),
    [(append, "is damaged: "), (lambda path: append(Path("trick.py")), "is from a different run: source_hash was ")],
)
def test_checkpoint_of_no_use(six_epochs, call, at_epoch, damage, message):
    """The command says so, and the run starts from the beginning."""
    at_epoch(4, raises(KeyboardInterrupt()))
    call(*ARGUMENTS)
    [path] = Path("runs").rglob("*.checkpoint")
    damage(path)
    status, out, err = call(*ARGUMENTS)
    assert (status, err) == (0, "") and out.count("warning: ") == 1 and "continuing" not in out
    [line] = [line for line in out.splitlines() if "warning: " in line]
    assert f"{path} {message}" in line and line.endswith("; starting from the beginning")
    assert leftovers() == [] and len(records_of()) == 1


def test_clock_that_goes_backwards(six_epochs, call, at_epoch, monkeypatch):
    """Files are from the future, and every look at the clock is a day before the last."""

    def turn_back():
        now = iter(range(int(time.time()), 0, -86_400))
        monkeypatch.setattr(time, "time", lambda: float(next(now)))
        for path in Path("runs").rglob("*"):
            os.utime(path, (2**32, 2**32))
        raise KeyboardInterrupt

    at_epoch(3, turn_back)
    call(*ARGUMENTS)
    status, out, _ = call(*ARGUMENTS)
    assert status == 0 and "continuing after epoch 3" in out
    [record] = records.find(Path("runs")).values()
    assert all(0 < row.train_seconds < 3600 for row in record.epochs) and 0 < record.result["train_seconds"] < 3600


def test_diverged_run_leaves_no_checkpoint(six_epochs, call, at_epoch):
    seen = []
    at_epoch(1, lambda: seen.extend(leftovers()))
    status, out, err = call(*ARGUMENTS, "--set", "optim.peak_lr=1e9")
    assert (status, err) == (1, "") and "trick diverged in epoch" in out and "1 diverged" in out
    assert len(seen) == 1 and leftovers() == []
    assert [record.status for record in records.find(Path("runs")).values()] == ["diverged"]


def test_what_a_killed_writer_left_is_taken_away(six_epochs, call):
    """After an hour: it may be a file that another process is about to put in its place."""
    folder = Path("runs/trick")
    folder.mkdir(parents=True)
    old = [folder / f".0f-0f-seed3.{kind}.12345.tmp" for kind in ("json", "tsv", "checkpoint")]
    others = [folder / ".0f-0f-seed4.json.12345.tmp", folder / ".mine.tmp"]
    for path in (*old, *others):
        path.write_text("half")
    for path in (*old, others[1]):
        os.utime(path, (time.time() - 3700,) * 2)
    assert call(*ARGUMENTS)[0] == 0
    assert [path for path in (*old, *others) if path.exists()] == others
    assert len(records.find(Path("runs"))) == 1


@contextlib.contextmanager
def child(*arguments, **options):
    """A command in another process; with `stdout` and `pipesize` it cannot run far ahead of the reader of its lines."""
    # A shell starts its background jobs, these tests among them, with SIGINT ignored.
    listen = "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    line = [sys.executable, "-c", f"{listen}runpy.run_module('fastcifar_jax', run_name='__main__')", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    options = {"stdout": subprocess.PIPE, "text": True, "pipesize": 4096, **options}
    with subprocess.Popen(line, env=environment, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def read_until(process, text):
    for line in process.stdout:
        if text in line:
            return
    pytest.fail(f"the process ended without {text!r}")


def assert_as_undisturbed(call):
    assert call(*LONG, "--out", "whole")[0] == 0
    assert records_of() == records_of("whole") and len(records_of()) == 2 and leftovers() == []


@pytest.mark.parametrize(
    "name", ["SIGKILL", *(pytest.param(name, marks=pytest.mark.slow) for name in ("SIGINT", "SIGTERM"))]
)
def test_killed_by_a_signal(six_epochs, call, name):
    """In the middle of seed 1."""
    with child(*LONG) as process:
        for text in ("trick, seed 1: ", "    1 ", "    9 "):
            read_until(process, text)
        process.send_signal(getattr(signal, name))
        rest, _ = process.communicate()
    assert process.returncode == (130 if name == "SIGINT" else -getattr(signal, name))
    assert name != "SIGINT" or "interrupted: 1 of 2 seeds: 1 finished" in rest
    [finished] = Path("runs").rglob("*.json")
    before = finished.read_bytes()
    status, out, _ = call(*LONG)
    assert status == 0 and out.count("continuing after epoch") == 1 and "1 skipped" in out
    assert_as_undisturbed(call)
    assert finished.read_bytes() == before


def test_same_command_in_the_middle_of_another(six_epochs, call, at_epoch):
    """As another process would run it: it continues from the checkpoint of the first, and both write one record."""
    inner = []
    at_epoch(3, lambda: inner.append(call(*ARGUMENTS)))
    status, _, err = call(*ARGUMENTS)
    assert (status, err) == (0, "")
    assert inner[0][0] == 0 and "continuing after epoch 3" in inner[0][1]
    assert call(*ARGUMENTS, "--out", "whole")[0] == 0
    assert records_of() == records_of("whole") and len(records_of()) == 1 and leftovers() == []


@pytest.mark.slow
def test_two_processes_on_one_folder(six_epochs, call):
    """They run the same seeds at once and continue from each other's files."""
    with child(*LONG) as process:
        read_until(process, "    5 ")
        status, out, err = call(*LONG)
        assert (status, err) == (0, "") and "2 finished" in out
        process.communicate()
    assert process.returncode == 0
    assert_as_undisturbed(call)


@pytest.mark.slow
def test_killed_at_any_time(six_epochs, call):
    rng, finished = random.Random(0), []
    for _ in range(5):
        with child(*LONG, stdout=subprocess.DEVNULL, pipesize=-1):
            time.sleep(rng.uniform(1, 9))
        finished.append(len(list(Path("runs").rglob("*.json"))))
    assert finished == sorted(finished)  # no kill costs a finished seed
    assert call(*LONG)[0] == 0
    assert_as_undisturbed(call)
