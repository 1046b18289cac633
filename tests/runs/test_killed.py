"""A command that is killed again and again ends with the records of one that was left alone."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TIMES = {"train_seconds", "setup_seconds", "transfer_seconds", "compile_seconds", "images_per_second"}
TRICK = """
from dataclasses import replace
from experiments.quickstart import quickstart
from fastcifar_jax.augment import Flip

RECIPE = replace(
    quickstart, model=quickstart.model.with_width(2), num_epochs=6, augmentations=(Flip(),), compute_dtype="float32"
)
"""


def command(folder, seeds, out):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    arguments = ["run", "trick.py", "--data", "digits", "--limit-train", "256", "--seeds", str(seeds), "--out", out]
    line = [sys.executable, "-m", "fastcifar_jax", *arguments]
    return subprocess.Popen(line, cwd=folder, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)


def without_times(path):
    record = json.loads(path.read_text())
    for name in ("started", "command"):
        del record[name]
    record["result"] = {name: value for name, value in record["result"].items() if name not in TIMES}
    for row in record["epochs"]:
        del row["train_seconds"]
    return record


@pytest.mark.slow
def test_killed_five_times_and_restarted(tmp_path):
    (tmp_path / "trick.py").write_text(TRICK)
    begin = time.monotonic()
    assert command(tmp_path, 8, "whole").wait() == 0
    seconds = time.monotonic() - begin
    rng = random.Random(0)
    kills, finished = 0, []
    while kills < 5:
        process = command(tmp_path, 8, "killed")
        try:
            process.wait(rng.uniform(0.1, 0.3) * seconds)
            pytest.fail("all seeds were finished before the fifth kill")
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
        finished.append(len(list((tmp_path / "killed").rglob("*.json"))))
    assert finished == sorted(finished)  # no kill costs a finished seed
    assert command(tmp_path, 8, "killed").wait() == 0
    whole, killed = (sorted((tmp_path / out).rglob("*.json")) for out in ("whole", "killed"))
    assert [path.name for path in whole] == [path.name for path in killed] and len(whole) == 8
    for one, other in zip(whole, killed, strict=True):
        assert without_times(one) == without_times(other)
