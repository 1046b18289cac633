"""Commands that are killed, or run twice at once, end with the records of one that was left alone."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers_records import without_times
from tests.helpers_runs import ARGUMENTS, leftovers, records_of

ROOT = Path(__file__).parents[2]
LONG = (*ARGUMENTS, "--epochs", "100", "--seeds", "2")  # longer than a child runs ahead
TRICK = """
from dataclasses import replace
from experiments.quickstart import quickstart
from fastcifar_jax.augment import Flip

RECIPE = replace(
    quickstart, model=quickstart.model.with_width(2), num_epochs=6, augmentations=(Flip(),), compute_dtype="float32"
)
"""


@contextlib.contextmanager
def child(*arguments, **options):
    """A command in another process; with `stdout` and `pipesize` it cannot run far ahead of the reader of its lines."""
    line = [sys.executable, "-m", "fastcifar_jax", *arguments]
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
def test_killed_five_times_and_restarted(tmp_path):
    (tmp_path / "trick.py").write_text(TRICK)

    def command(out):
        arguments = ("run", "trick.py", "--data", "digits", "--limit-train", "256", "--seeds", "8", "--out", out)
        return child(*arguments, cwd=tmp_path, stdout=subprocess.DEVNULL, pipesize=-1, start_new_session=True)

    begin = time.monotonic()
    with command("whole") as process:
        assert process.wait() == 0
    seconds = time.monotonic() - begin
    rng = random.Random(0)
    kills, finished = 0, []
    while kills < 5:
        with command("killed") as process:
            try:
                process.wait(rng.uniform(0.1, 0.3) * seconds)
                pytest.fail("all seeds were finished before the fifth kill")
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                kills += 1
        finished.append(len(list((tmp_path / "killed").rglob("*.json"))))
    assert finished == sorted(finished)  # no kill costs a finished seed
    with command("killed") as process:
        assert process.wait() == 0
    whole, killed = (sorted((tmp_path / out).rglob("*.json")) for out in ("whole", "killed"))
    assert [path.name for path in whole] == [path.name for path in killed] and len(whole) == 8
    for one, other in zip(whole, killed, strict=True):
        assert without_times(one) == without_times(other)
