"""Faults around a run give one clear line, and damage or lose no record of a finished seed.

Elsewhere: killed processes in `test_killed.py`; interrupted and crashed commands in `test_checkpoint.py` and
`tests/cli/test_app.py`; failed writes and foreign records in `test_records.py`; damaged checkpoints in
`test_checkpoint.py`; damaged data in `tests/data`; one of several processes that dies in `tests/parallel`.
"""

import contextlib
import os
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from fastcifar_jax.ops import backend
from fastcifar_jax.runs import records
from tests.helpers_runs import ARGUMENTS, leftovers, raises, records_of

resource = pytest.importorskip("resource", reason="needs the limits of POSIX")


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


def fill(path):
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


@contextlib.contextmanager
def full(folder):
    fill(folder / "filler")
    yield
    (folder / "filler").unlink()


def check_full(call, full, text):
    """A seed that finished before stays on record; the other one is trained to its end, reported, and not on record."""
    assert call(*ARGUMENTS)[0] == 0
    [finished] = Path("runs").rglob("*.json")
    before = finished.read_bytes()
    with full:
        status, out, err = call(*ARGUMENTS, "--seeds", "2")
        assert (status, err.count("\n")) == (1, 1) and f"seed1.json: {text}; make room or choose another --out" in err
        assert out.count("warning: no checkpoint of epoch") == 6 and f".checkpoint: {text}; training continues" in out
        assert "1 of 2 seeds: 1 finished" in out and leftovers() == []
        assert list(records_of()) == [finished.name]
    assert call(*ARGUMENTS, "--seeds", "2")[0] == 0
    assert len(records_of()) == 2 and finished.read_bytes() == before


def test_full_disk(small_disk, call):
    check_full(call, full(small_disk), "No space left on device")


def test_files_that_may_not_grow(six_epochs, call):
    check_full(call, files_of_no_length(), "File too large")


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


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is damaged: "),
        (lambda path: path.write_text("not mine"), "is damaged: "),
        (
            lambda path: Path("trick.py").write_text(Path("trick.py").read_text() + "# changed\n"),
            "is from a different run: source_hash was ",
        ),
    ],
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


def test_data_that_are_not_numbers(six_epochs, call):
    arrays = dict(np.load("tiny.npz"))
    arrays["x_train"] = arrays["x_train"].astype(np.float32)
    arrays["x_train"][3, 5, 7] = np.nan
    np.savez("tiny.npz", **arrays)
    status, _, err = call(*ARGUMENTS)
    assert (status, err.count("\n")) == (2, 1) and "tiny.npz" in err and not Path("runs").exists()


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


def test_check_of_onednn_that_cannot_be_remembered(tmp_path, monkeypatch):
    check = backend.check_onednn.__wrapped__  # without the memory of this process
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(backend, "_run_check", lambda: (True, "agreed"))
    with files_of_no_length():
        assert check() == (True, "agreed")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert check() == (True, "agreed")
    monkeypatch.setattr(backend, "_run_check", lambda: (False, "asked again"))
    assert check() == (True, "agreed")
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1
