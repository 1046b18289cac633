"""A run that is killed and goes on ends as one that was left alone, bit for bit but for the times."""

import contextlib
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.airbench import airbench94, airbench94_muon
from experiments.bag_of_tricks import final
from fastcifar_jax.augment import AlternatingFlip, Crop
from fastcifar_jax.cli import app as cli
from fastcifar_jax.data.load import load_data
from fastcifar_jax.evaluate import NoTTA
from fastcifar_jax.runs import checkpoint, records
from fastcifar_jax.runs.checkpoint import CheckpointError
from fastcifar_jax.train import make_functions, make_train, shapes_of
from fastcifar_jax.types import Dataset, EpochInfo, Snapshot, TrainState
from tests.helpers_cli import TRICK
from tests.runs.test_killed import without_times
from tests.runs.test_records import RECORD
from tests.test_train import numbers, small

ROOT = Path(__file__).parents[2]
ROWS = (EpochInfo(1, 3.5, 1.5, 0.5, 1.25, 0.75, 1.2, 0.1 + 0.2), EpochInfo(2, 0.1, 0.5, 0.75, 0.25, 0.9, 0.2, 0.9))


def tiny_air(recipe):
    """Two and a half epochs of three steps."""
    changes = {"init_images": 64, "tta": NoTTA(), "augmentations": (Crop(2), AlternatingFlip()), "batch_size": 32}
    return replace(recipe, num_epochs=2.5, model=recipe.model.with_width(4), compute_dtype="float32", **changes)


RECIPES = {
    "final": small(final),  # ghost norm, EMA
    "airbench94": tiny_air(airbench94),  # AirbenchSGD, Lookahead, a fraction of an epoch
    "airbench94_muon": tiny_air(airbench94_muon),
}


@pytest.fixture(scope="module")
def digits():
    dataset, _ = load_data("digits", limit_train=112)
    images, labels = dataset.test_images[:20], dataset.test_labels[:20]
    return jax.device_put(Dataset(dataset.train_images, dataset.train_labels, images, labels))


def assert_same_bits(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.mark.parametrize(
    ("name", "driver"),
    [
        ("final", "python"),
        ("airbench94", "scan"),
        pytest.param("airbench94_muon", "python", marks=pytest.mark.slow),
        pytest.param("final", "scan", marks=pytest.mark.slow),
        pytest.param("airbench94", "python", marks=pytest.mark.slow),
        pytest.param("airbench94_muon", "scan", marks=pytest.mark.slow),
    ],
)
def test_resumed_run_equals_the_undisturbed_one(tmp_path, digits, name, driver):
    recipe, key = RECIPES[name], jax.random.key(0)
    train = make_train(recipe, 10, driver)
    whole = train(key, digits)
    path = tmp_path / "x.checkpoint"
    like = shapes_of(make_functions(recipe, 10, 112), recipe, digits).state

    def kill(row):
        if row.epoch == killed_after:
            raise KeyboardInterrupt

    for killed_after in range(1, len(whole.epochs) + 1):
        with pytest.raises(KeyboardInterrupt):
            train(key, digits, kill, on_snapshot=lambda snapshot: checkpoint.save(path, snapshot, RECORD))
        resume = checkpoint.load(path, RECORD, like)
        assert [row.epoch for row in resume.epochs] == list(range(1, killed_after + 1))
        seen = []
        resumed = train(key, digits, seen.append, resume=resume)
        assert [row.epoch for row in seen] == list(range(killed_after + 1, len(whole.epochs) + 1))
        assert resumed.epochs[:killed_after] == resume.epochs and resumed.setup_seconds == resume.setup_seconds
        assert numbers(resumed) == numbers(whole)
        assert_same_bits(resumed.state, whole.state)


def make_snapshot():
    """Every kind of leaf and of node that a state may have."""
    params = {"a/b": jnp.array([[jnp.nan, -0.0, 1e-45]]), "b": {"kernel": jnp.arange(6, dtype=jnp.bfloat16) / 7}}
    stats = {"count": jnp.uint32(7), "on": jnp.array([True, False]), "none": jnp.zeros((0, 3))}
    tx = optax.chain(optax.trace(0.9), optax.scale_by_schedule(lambda count: 1.0), optax.identity())
    return Snapshot(TrainState(jnp.int32(5), params, {}, stats, tx.init(params), ()), ROWS, 0.7)


def shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


@pytest.mark.parametrize("x64", [False, True])
def test_round_trip(tmp_path, x64):
    path = tmp_path / "new folder" / "x.checkpoint"
    with jax.enable_x64(x64):
        snapshot = make_snapshot()
        assert checkpoint.load(path, RECORD, shapes(snapshot.state)) is None
        checkpoint.save(path, snapshot, RECORD)
        found = checkpoint.load(path, RECORD, shapes(snapshot.state))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(found.state)} >= {"bfloat16", "float64" if x64 else "float32"}
    assert_same_bits(found.state, snapshot.state)
    assert found[1:] == snapshot[1:]
    assert [file.name for file in path.parent.iterdir()] == ["x.checkpoint"]


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "x.checkpoint"
    checkpoint.save(path, make_snapshot(), RECORD)
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe_hash": "0f"}, f"recipe was {final.hash} and is 0f"),
        ({"source_hash": "cd"}, "source code was ab and is cd"),
        ({"seed": 4}, "seed was 3 and is 4"),
        ({"driver": "scan", "conv": "onednn"}, "driver was python and is scan, conv was lax and is onednn"),
        ({"data": {**RECORD.data, "train": 49_999}}, "data.train was 50000 and is 49999"),
        ({"data": {**RECORD.data, "hash": "fe"}}, "data.hash was 0123456789abcdef and is fe"),
        ({"device": {**RECORD.device, "kind": "TPU v9"}}, "device.kind was cpu and is TPU v9"),
        ({"versions": {"python": "3.11", "jax": "9"}}, "versions.jax was None and is 9"),
    ],
)
def test_what_was_made_otherwise_is_not_gone_on_with(saved, changes, message):
    with pytest.raises(CheckpointError) as error:
        checkpoint.load(saved, replace(RECORD, **changes), shapes(make_snapshot().state))
    assert str(error.value) == f"{saved} was made otherwise: {message}"


def test_settings_from_outside_count_too(saved, monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    with pytest.raises(CheckpointError, match="settings.ONEDNN_MAX_CPU_ISA was None and is AVX2"):
        checkpoint.load(saved, RECORD, shapes(make_snapshot().state))


def test_moved_data_are_the_same_data(saved):
    moved = replace(RECORD, data={**RECORD.data, "source": "elsewhere/cifar10"})
    assert checkpoint.load(saved, moved, shapes(make_snapshot().state)).epochs == ROWS


def test_every_changed_byte_is_noticed(saved):
    """A changed file is refused, or (a space in the header) means the same; it is never a mixture."""
    whole, like, refused = saved.read_bytes(), shapes(make_snapshot().state), 0
    for position in range(0, len(whole), 7):
        saved.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        try:
            found = checkpoint.load(saved, RECORD, like)
        except CheckpointError as error:
            assert "\n" not in str(error) and str(saved) in str(error)
            refused += 1
        else:
            assert_same_bits(found.state, make_snapshot().state)
            assert found[1:] == (ROWS, 0.7)
    assert refused > len(whole) // 7 - 8


@pytest.mark.parametrize("length", [0, 7, 8, 500, -1])
def test_truncated_file(saved, length):
    saved.write_bytes(saved.read_bytes()[:length])
    with pytest.raises(CheckpointError, match="x.checkpoint is damaged: "):
        checkpoint.load(saved, RECORD, shapes(make_snapshot().state))


def test_file_of_another_kind(saved, monkeypatch):
    like = shapes(make_snapshot().state)
    for change, message in (
        ({"params": {"b": like.params["b"]}}, "is damaged: it holds other arrays than the run needs, params"),
        ({"step": jax.ShapeDtypeStruct((), jnp.int8)}, r"is damaged: step is int32\(\); expected int8\(\)"),
        ({"step": jax.ShapeDtypeStruct((1,), jnp.int32)}, r"is damaged: step is int32\(\); expected int32\(1,\)"),
    ):
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load(saved, RECORD, like._replace(**change))
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    with pytest.raises(CheckpointError, match="x.checkpoint has format 1; expected 2"):
        checkpoint.load(saved, RECORD, like)
    saved.unlink()
    saved.mkdir()
    with pytest.raises(CheckpointError, match="x.checkpoint is damaged: "):
        checkpoint.load(saved, RECORD, like)


# The commands.

ARGUMENTS = ("run", "trick.py", "--data", "tiny.npz", "--driver", "python", "--checkpoint")


@pytest.fixture
def six_epochs(workplace, compiled_once):
    """trick.py runs for six epochs and compiles in a second."""
    (workplace / "trick.py").write_text(TRICK.replace("num_epochs=2,", "num_epochs=6, augmentations=(),"))
    return workplace


def raises(error):
    def action():
        raise error

    return action


def records_of(out="runs"):
    """The finished runs on record, but for times and commands, by the names of their files."""
    return {path.name: without_times(path) for path in sorted(Path(out).rglob("*.json"))}


def leftovers(out="runs"):
    return [path.name for path in Path(out).rglob("*") if path.suffix in (".checkpoint", ".tmp")]


def test_interrupted_command_goes_on(six_epochs, call, at_epoch):
    arguments = (*ARGUMENTS, "--seeds", "2")
    assert call(*arguments, "--out", "whole")[0] == 0 and leftovers("whole") == []
    at_epoch(4, raises(KeyboardInterrupt()))
    status, out, err = call(*arguments)
    assert (status, err) == (130, "") and "interrupted: 0 of 2 seeds" in out
    [file] = Path("runs").rglob("*seed0.checkpoint")
    at_epoch(6, raises(KeyboardInterrupt()))  # all is trained, but not on record
    status, out, err = call(*arguments)
    assert status == 130 and f"trick, seed 0: going on after epoch 4, from {file}\n" in out
    status, out, err = call(*arguments)
    assert (status, err) == (0, "") and f"trick, seed 0: going on after epoch 6, from {file}\n" in out
    assert out.count("going on") == 1 and leftovers() == []
    rows = [line.split()[0] for line in out.splitlines() if line[:5].strip().isdecimal()]
    assert rows == list("123456") * 2  # the whole table
    assert records_of() == records_of("whole") and len(records_of()) == 2
    [log] = Path("runs").rglob("*seed0.tsv")
    assert len(log.read_text().splitlines()) == 7


def test_crashed_run_keeps_its_checkpoint_and_only_who_asks_for_it_gets_it(six_epochs, call, at_epoch):
    at_epoch(3, raises(RuntimeError("cat")))
    with pytest.raises(RuntimeError, match="cat"):
        cli.main(list(ARGUMENTS))
    [crashed] = records.find(Path("runs")).values()
    assert crashed.status == "crashed" and len(crashed.epochs) == 3
    at_epoch(5, raises(RuntimeError("dog")))
    with pytest.raises(RuntimeError, match="dog"):
        cli.main(list(ARGUMENTS))
    [crashed] = records.find(Path("runs")).values()
    assert crashed.error == "RuntimeError: dog" and [row.epoch for row in crashed.epochs] == [1, 2, 3, 4, 5]
    status, out, _ = call(*ARGUMENTS[:-1])
    assert status == 0 and out.count("going on") == 1 and leftovers() == []  # that of the second run


def test_compare_goes_on(six_epochs, call, at_epoch):
    Path("other.py").write_text(Path("trick.py").read_text())
    arguments = ("compare", "trick.py", "other.py", *ARGUMENTS[2:], "--seeds", "2")
    at_epoch(2, raises(KeyboardInterrupt()))
    assert call(*arguments)[0] == 130
    status, out, _ = call(*arguments)
    assert status == 0 and out.count("going on after epoch 2") == 1 and leftovers() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("run trick.py --strategy vmap", "--checkpoint is for one seed after another"),
        ("run trick.py --mesh 1", "--checkpoint is for one seed after another"),
        ("run trick.py --distributed", "--checkpoint is for one seed after another"),
        ("run torch:final", "torch: arms have no checkpoints"),
        ("compare final torch:final --seeds 2", "torch: arms have no checkpoints"),
    ],
)
def test_refused(workplace, call, arguments, message):
    status, _, err = call(*arguments.split(), "--data", "tiny.npz", "--checkpoint")
    assert status == 2 and message in err and err.count("\n") == 1 and not Path("runs").exists()


@contextlib.contextmanager
def child(*arguments):
    """A command in another process, which cannot run far ahead of who reads its lines."""
    line = [sys.executable, "-m", "fastcifar_jax", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, text=True, pipesize=4096) as process:
        try:
            yield process
        finally:
            process.kill()


def read_until(process, text):
    for line in process.stdout:
        if text in line:
            return
    pytest.fail(f"the process ended without {text!r}")


LONG = (*ARGUMENTS, "--epochs", "200", "--seeds", "2")  # longer than a child runs ahead


@pytest.fixture(scope="module")
def undisturbed():
    """What `LONG` leaves on record; filled by the first test that needs it."""
    return {}


def assert_as_undisturbed(undisturbed, call):
    if not undisturbed:
        assert call(*LONG, "--out", "whole")[0] == 0
        undisturbed.update(records_of("whole"))
    assert records_of() == undisturbed and len(undisturbed) == 2 and leftovers() == []


@pytest.mark.parametrize(
    "name", ["SIGKILL", *(pytest.param(name, marks=pytest.mark.slow) for name in ("SIGINT", "SIGTERM"))]
)
def test_killed_by_a_signal(six_epochs, call, undisturbed, name):
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
    assert status == 0 and out.count("going on after epoch") == 1 and "1 skipped" in out
    assert_as_undisturbed(undisturbed, call)
    assert finished.read_bytes() == before


def test_two_processes_on_one_folder(six_epochs, call, undisturbed):
    """They run the same seeds at once and go on from each other's files."""
    with child(*LONG) as process:
        read_until(process, "    5 ")
        status, out, err = call(*LONG)
        assert (status, err) == (0, "") and "2 finished" in out
        process.communicate()
    assert process.returncode == 0
    assert_as_undisturbed(undisturbed, call)
