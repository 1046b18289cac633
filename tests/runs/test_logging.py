"""Live logging writes what the epoch table says."""

import json
import struct

import pytest

from fastcifar_jax.runs.logging import tensorboard
from fastcifar_jax.types import EpochInfo

event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2", reason="tensorboardX is not installed")

ROWS = [EpochInfo(epoch, 1.0, 2.0 / epoch, 0.25, 4.0, 0.5, 6.0, 0.75) for epoch in (1, 2)]


def scalars(folder):
    """(name, step) -> value, from all event files of a folder."""
    found = {}
    for file in sorted(folder.glob("events.*")):
        data = file.read_bytes()
        while data:  # length, its checksum, the event, its checksum
            (length,) = struct.unpack("<Q", data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
            data = data[16 + length :]
    return found


def test_every_number_of_the_table(tmp_path):
    log = tensorboard(tmp_path)
    for row in ROWS:
        log("torch:final, seed 0", row)
    [folder] = tmp_path.iterdir()
    expected = {(name, row.epoch): getattr(row, name) for row in ROWS for name in EpochInfo._fields[1:]}
    assert scalars(folder) == pytest.approx(expected)


def test_log_of_a_run(workplace, call, trained):
    status, _, err = call("run", "trick.py", "--data", "tiny.npz", "--log", "tensorboard")
    assert (status, err) == (0, "")
    found = scalars(workplace / "runs" / "tensorboard" / "trick, seed 0")
    record = json.loads(next((workplace / "runs" / "trick").glob("*.json")).read_text())
    assert found["test_accuracy", 1] == pytest.approx(record["epochs"][0]["test_accuracy"])
    assert {step for _, step in found} == {row["epoch"] for row in record["epochs"]}
