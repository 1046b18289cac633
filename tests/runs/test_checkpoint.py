"""A run that is interrupted and continues ends like an undisturbed one, bit for bit but for the times."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.airbench import airbench94, airbench94_muon
from experiments.bag_of_tricks import final
from fastcifar_jax.cli import app as cli
from fastcifar_jax.functions import make_functions, shapes_of
from fastcifar_jax.runs import records
from fastcifar_jax.runs.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from fastcifar_jax.train import compile_run, train_epochs
from fastcifar_jax.types import EpochInfo, Snapshot, TrainState
from tests.helpers_records import RECORD, with_changes
from tests.helpers_runs import ARGUMENTS, leftovers, raises, records_of
from tests.helpers_train import DATASET, NUM_TRAIN, linear, numbers, small

ROWS = (EpochInfo(1, 3.5, 1.5, 0.5, 1.25, 0.75, 1.2, 0.1 + 0.2), EpochInfo(2, 0.1, 0.5, 0.75, 0.25, 0.9, 0.2, 0.9))


def assert_same_bits(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.mark.parametrize(
    "recipe",
    [
        linear(2.6, recipe=airbench94),  # AirbenchSGD, Lookahead
        pytest.param(small(final, 2.6), marks=pytest.mark.slow),  # ghost norm, EMA
        pytest.param(small(airbench94_muon, 2.6), marks=pytest.mark.slow),
    ],
    ids=lambda recipe: recipe.name,
)
def test_resumed_run_equals_the_undisturbed_one(tmp_path, recipe):
    """Two epochs of three steps and one of two, resumed after each."""
    compiled, key, path = compile_run(recipe, 4, DATASET), jax.random.key(0), tmp_path / "x.checkpoint"
    whole = []
    for snapshot in train_epochs(recipe, 4, key, DATASET, compiled=compiled):
        whole.append(jax.device_get(snapshot))
    like = shapes_of(make_functions(recipe, 4, NUM_TRAIN), recipe, DATASET).state
    for before in whole[:-1]:
        save_checkpoint(path, before, RECORD)
        resume = load_checkpoint(path, RECORD, like)
        assert resume.epochs == before.epochs and resume.setup_seconds == before.setup_seconds
        *_, last = train_epochs(recipe, 4, key, DATASET, compiled=compiled, resume=resume)
        assert numbers(last) == numbers(whole[-1])
        assert_same_bits(jax.device_get(last.state), whole[-1].state)


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
        assert load_checkpoint(path, RECORD, shapes(snapshot.state)) is None
        save_checkpoint(path, snapshot, RECORD)
        found = load_checkpoint(path, RECORD, shapes(snapshot.state))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(found.state)} >= {"bfloat16", "float64" if x64 else "float32"}
    assert_same_bits(found.state, snapshot.state)
    assert found[1:] == snapshot[1:]
    assert [file.name for file in path.parent.iterdir()] == ["x.checkpoint"]


@pytest.fixture(scope="module")
def like():
    return shapes(make_snapshot().state)


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "x.checkpoint"
    save_checkpoint(path, make_snapshot(), RECORD)
    return path.read_bytes()


@pytest.fixture
def saved(tmp_path, content):
    path = tmp_path / "x.checkpoint"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe_hash": "0f"}, f"recipe was {final.hash} and is 0f"),
        ({"seed": 4}, "seed was 3 and is 4"),
        ({"source_hash": "cd", "conv": "onednn"}, "source_hash was ab and is cd, conv was lax and is onednn"),
        ({"data": {"train": 49_999, "source": "moved"}}, "data.train was 50000 and is 49999"),
        ({"data": {"hash": "fe"}}, "data.hash was 0123456789abcdef and is fe"),
        ({"device": {"kind": "TPU v9"}}, "device.kind was cpu and is TPU v9"),
        ({"versions": {"jax": "9"}}, "versions.jax was None and is 9"),
        ({"mesh": "1x2"}, "mesh was 1x1 and is 1x2"),
        ({"settings": {"XLA_FLAGS": "--x"}}, "settings.XLA_FLAGS was None and is --x"),
    ],
)
def test_different_run_does_not_continue(saved, like, changes, message):
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(saved, with_changes(RECORD, **changes), like)
    assert str(error.value) == f"{saved} is from a different run: {message}"


def test_moved_data_are_the_same_data(saved, like):
    moved = with_changes(RECORD, data={"source": "elsewhere/cifar10"})
    assert load_checkpoint(saved, moved, like).epochs == ROWS


def test_every_changed_byte_is_noticed(saved, like):
    """A changed file is refused, or (a space in the header) means the same; it is never a mixture."""
    whole, state, refused = saved.read_bytes(), make_snapshot().state, 0
    for position in range(0, len(whole), 23):
        saved.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        try:
            found = load_checkpoint(saved, RECORD, like)
        except CheckpointError as error:
            assert "\n" not in str(error) and str(saved) in str(error)
            refused += 1
        else:
            assert_same_bits(found.state, state)
            assert found[1:] == (ROWS, 0.7)
    assert refused > len(whole) // 23 - 8


@pytest.mark.parametrize("length", [0, 7, 8, 500, -1])
def test_truncated_file(saved, like, length):
    saved.write_bytes(saved.read_bytes()[:length])
    with pytest.raises(CheckpointError, match="x.checkpoint is damaged: "):
        load_checkpoint(saved, RECORD, like)


def test_file_of_another_kind(saved, like):
    for change, message in (
        ({"params": {"b": like.params["b"]}}, "is damaged: its arrays are not those of the run, starting with params"),
        ({"step": jax.ShapeDtypeStruct((), jnp.int8)}, r"is damaged: step is int32\(\); expected int8\(\)"),
        ({"step": jax.ShapeDtypeStruct((1,), jnp.int32)}, r"is damaged: step is int32\(\); expected int32\(1,\)"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(saved, RECORD, like._replace(**change))
    saved.unlink()
    saved.mkdir()
    with pytest.raises(CheckpointError, match="x.checkpoint is damaged: "):
        load_checkpoint(saved, RECORD, like)


# The commands.


def test_interrupted_command_continues(six_epochs, call, at_epoch):
    arguments = (*ARGUMENTS, "--seeds", "2")
    assert call(*arguments, "--out", "whole")[0] == 0 and leftovers("whole") == []
    at_epoch(4, raises(KeyboardInterrupt()))
    status, out, err = call(*arguments)
    assert (status, err) == (130, "") and "interrupted: 0 of 2 seeds" in out
    [file] = Path("runs").rglob("*seed0.checkpoint")
    at_epoch(6, raises(KeyboardInterrupt()))  # all is trained, but not on record
    status, out, err = call(*arguments)
    assert status == 130 and f"trick, seed 0: continuing after epoch 4, from {file}\n" in out
    status, out, err = call(*arguments)
    assert (status, err) == (0, "") and f"trick, seed 0: continuing after epoch 6, from {file}\n" in out
    assert out.count("continuing") == 1 and leftovers() == []
    rows = [line.split()[0] for line in out.splitlines() if line[:5].strip().isdecimal()]
    assert rows == list("123456") * 2  # the whole table
    assert records_of() == records_of("whole") and len(records_of()) == 2
    [log] = Path("runs").rglob("*seed0.tsv")
    assert len(log.read_text().splitlines()) == 7


def test_crashed_run_keeps_its_checkpoint_which_is_used_only_on_request(six_epochs, call, at_epoch):
    for epoch, fault in ((3, "cat"), (5, "dog")):
        at_epoch(epoch, raises(RuntimeError(fault)))
        with pytest.raises(RuntimeError, match=fault):
            cli.main(list(ARGUMENTS))
        [crashed] = records.find(Path("runs")).values()
        assert (crashed.status, crashed.error) == ("crashed", f"RuntimeError: {fault}")
        assert [row.epoch for row in crashed.epochs] == list(range(1, epoch + 1))
    status, out, _ = call(*ARGUMENTS[:-1])
    assert status == 0 and out.count("continuing") == 1 and leftovers() == []  # that of the second run


def test_compare_continues(six_epochs, call, at_epoch):
    Path("other.py").write_text(Path("trick.py").read_text())
    arguments = ("compare", "trick.py", "other.py", *ARGUMENTS[2:], "--seeds", "2")
    at_epoch(2, raises(KeyboardInterrupt()))
    assert call(*arguments)[0] == 130
    status, out, _ = call(*arguments)
    assert status == 0 and out.count("continuing after epoch 2") == 1 and leftovers() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("run trick.py --mesh 1", "--checkpoint cannot be combined with --mesh or --distributed"),
        ("run trick.py --distributed", "--checkpoint cannot be combined with --mesh or --distributed"),
        ("run torch:final", "torch: arms have no checkpoints"),
        ("compare final torch:final --seeds 2", "torch: arms have no checkpoints"),
    ],
)
def test_refused(workplace, call, arguments, message):
    status, _, err = call(*arguments.split(), "--data", "tiny.npz", "--checkpoint")
    assert status == 2 and message in err and err.count("\n") == 1 and not Path("runs").exists()
