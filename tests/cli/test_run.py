"""The command `run`: real runs of a linear network, and what becomes of those that only pretend to train."""

import json
import math
import os
from pathlib import Path

import pytest

from experiments import bag_of_tricks
from fastcifar_jax.cli import app as cli
from fastcifar_jax.ops import backend
from fastcifar_jax.recipe import change, flatten
from fastcifar_jax.runs import experiments as discover
from fastcifar_jax.runs import records
from fastcifar_jax.train import Diverged
from fastcifar_jax.types import EpochInfo
from tests.helpers_cli import TRICK


@pytest.fixture
def full_disk(monkeypatch):
    def replace(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", replace)


def written(folder="runs"):
    return {record.seed: record for record in records.find(Path(folder)).values()}


def test_run_of_a_file(workplace, call, compiled_once):
    """A real run: record, log, table; then everything is on record."""
    arguments = ("run", "trick.py", "--data", "tiny.npz", "--seeds", "2")
    status, out, err = call(*arguments)
    assert (status, err) == (0, "")
    assert out.count("epoch   train s      loss  accuracy      test       TTA  images/s") == 2
    assert out.count("compiling\n") == 1 and out.count("training\n") == 1
    assert "tiny.npz: 130 training and 20 test images, 10 classes" in out
    assert "trick: n = 2; mean test" in out and "sample standard deviation" in out
    assert "2 of 2 seeds: 2 finished, 0 diverged, 0 crashed; 0 skipped because on record; records in runs" in out
    assert "\x1b" not in out and "\r" not in out
    assert "published" not in out

    [first, second] = written().values()
    assert (first.seed, second.seed, first.experiment, first.framework) == (0, 1, "trick", "jax")
    assert first.status == "finished" and first.error is None and first.command == arguments
    data = first.provenance.data
    assert data == {"source": "tiny.npz", "hash": data["hash"], "train": 130, "test": 20}
    assert first.provenance.conv == backend.conv_backend()[0]
    assert first.recipe["model"] == {"type": "Linear", "width": 3} and "Linear(width=3)" in first.recipe_repr
    for record in (first, second):
        assert [epoch.epoch for epoch in record.epochs] == [1, 2]
        parts = sum(epoch.train_seconds for epoch in record.epochs)
        parts += record.result["setup_seconds"] + record.result["transfer_seconds"]
        assert record.result["train_seconds"] == pytest.approx(parts)
        assert record.result["test_accuracy"] == record.epochs[-1].test_accuracy
    assert first.result["transfer_seconds"] == second.result["transfer_seconds"] > 0
    assert first.started.endswith("+00:00")
    for path in Path("runs").glob("*/*.json"):
        assert path.with_suffix(".tsv").read_text().startswith("epoch\thours\ttop1Accuracy\n1\t0.0")

    before = {path: path.read_bytes() for path in Path("runs").glob("*/*")}
    status, out, err = call(*arguments)
    assert (status, err) == (0, "") and "2 skipped" in out and "mean test" in out and "compiling\n" not in out
    assert before == {path: path.read_bytes() for path in Path("runs").glob("*/*")}


def test_fork_builds_on_an_experiment(workplace, call, trained):
    """A file that imports a declared recipe; `tests/runs/test_saved_model.py` trains one."""
    (workplace / "narrow.py").write_text(
        "from dataclasses import replace\nfrom experiments.bag_of_tricks import baseline\n"
        "RECIPE = replace(baseline, num_epochs=1, batch_size=64)\n"
    )
    status, out, err = call("run", "narrow.py", "--width", "4", "--data", "tiny.npz", "--limit-train", "64")
    assert (status, err) == (0, "")
    assert written()[0].recipe["model"]["channels"] == [4, 8, 16, 32]
    assert written()[0].experiment == "narrow" and written()[0].provenance.data["train"] == 64


def test_diverged_run(workplace, call, compiled_once):
    """It is on record, leaves no model, and is not repeated."""
    arguments = ("run", "trick.py", "--data", "tiny.npz", "--save", "--set", "optim.peak_lr=1e38")
    status, out, err = call(*arguments)
    assert (status, err) == (1, "") and "trick diverged in epoch" in out and "1 diverged" in out
    [path] = Path("runs").glob("*/*")
    fields = json.loads(path.read_text())
    assert fields["status"] == "diverged" and fields["result"] is None and "diverged in epoch" in fields["error"]
    assert fields["epochs"][-1]["train_loss"] is None or fields["epochs"][-1]["test_loss"] is None
    status, out, err = call(*arguments)
    assert status == 1 and "1 diverged, 0 crashed; 1 skipped" in out and "compiling" not in out


def test_bad_seeds_do_not_stop_the_others(workplace, call, loaded, trained):
    nan = EpochInfo(1, 8.0, math.nan, 0.1, math.nan, 0.1, math.nan, 0.1)
    trained[0][1] = Diverged("trick", (nan,))
    status, out, _ = call("run", "trick.py", "--seeds", "3")
    assert status == 1 and "3 of 3 seeds: 2 finished, 1 diverged, 0 crashed; 0 skipped" in out
    assert [record.status for record in written().values()] == ["finished", "diverged", "finished"]
    assert "trick: n = 2; mean test 95.00 %, s = 1.41 %; TTA 95.50 %, s = 1.41 %" in out


def test_finished_and_diverged_seeds_are_skipped_and_crashed_ones_are_not(workplace, call, loaded, trained):
    raises, seeds = trained
    raises[1] = Diverged("trick", (EpochInfo(1, 8.0, math.nan, 0.1, math.nan, 0.1, math.nan, 0.1),))
    raises[2] = RuntimeError("the cat sat on the keyboard")
    with pytest.raises(RuntimeError, match="the cat sat"):
        cli.main(["run", "trick.py", "--seeds", "4"])
    crashed = written()[2]
    assert (crashed.status, crashed.error) == ("crashed", "RuntimeError: the cat sat on the keyboard")
    assert len(crashed.epochs) == 1 and crashed.result is None

    raises.clear()
    seeds.clear()
    status, out, _ = call("run", "trick.py", "--seeds", "4")
    assert (
        [seed for _, seed in seeds] == [2, 3] and status == 1 and "3 finished, 1 diverged, 0 crashed; 2 skipped" in out
    )
    assert "n = 3" in out
    seeds.clear()
    status, out, _ = call("run", "trick.py", "--seeds", "1-2", "--rerun")
    assert (
        [seed for _, seed in seeds] == [1, 2] and status == 0 and "2 finished, 0 diverged, 0 crashed; 0 skipped" in out
    )


def test_crash_shows_its_counts_and_its_traceback(workplace, capsys, loaded, trained):
    trained[0][1] = ValueError("in the middle of training")
    with pytest.raises(ValueError, match="in the middle of training"):
        cli.main(["run", "trick.py", "--seeds", "3"])
    out = capsys.readouterr().out
    assert "trick, seed 1: crashed: ValueError: in the middle of training" in out
    assert "2 of 3 seeds: 1 finished, 0 diverged, 1 crashed" in out


def test_interruption_keeps_the_finished_seeds(workplace, call, loaded, trained):
    trained[0][1] = KeyboardInterrupt()
    status, out, err = call("run", "trick.py", "--seeds", "3")
    assert (status, err) == (130, "") and "interrupted: 1 of 3 seeds: 1 finished, 0 diverged, 0 crashed" in out
    assert list(written()) == [0] and len(list(Path("runs").rglob("*.json"))) == 1


def test_interruption_before_training(workplace, call, monkeypatch):
    def load(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastcifar_jax.data.load.load_data", load)
    status, _, err = call("run", "trick.py")
    assert (status, err.strip()) == (130, "error: interrupted")


def test_full_disk(workplace, call, loaded, trained, full_disk):
    status, out, err = call("run", "trick.py", "--seeds", "2")
    assert status == 1 and err.count("\n") == 1 and "No space left on device" in err
    assert "0 of 2 seeds" in out and [path for path in Path("runs").rglob("*") if path.is_file()] == []


def test_crash_on_a_full_disk_keeps_its_traceback(workplace, loaded, trained, full_disk):
    trained[0][0] = RuntimeError("cat")
    with pytest.raises(RuntimeError, match="cat") as crash:
        cli.main(["run", "trick.py"])
    assert "No space left" in crash.value.__notes__[0]


def test_damaged_record_is_named_and_not_trained_over(workplace, call, loaded, trained):
    call("run", "trick.py")
    [path] = Path("runs").rglob("*.json")
    path.write_text(path.read_text()[:100])
    trained[1].clear()
    status, _, err = call("run", "trick.py")
    assert status == 2 and err.count("\n") == 1 and path.name in err and trained[1] == []
    assert call("run", "trick.py", "--rerun")[0] == 0 and written()[0].status == "finished"


def test_record_of_other_source_code_is_pointed_out(workplace, call, loaded, trained):
    call("run", "trick.py")
    assert "with different" not in call("run", "trick.py")[1]
    Path("trick.py").write_text(TRICK + "\n# changed\n")
    assert "on record, with different source_hash; --rerun repeats it" in call("run", "trick.py")[1]


def test_default_data(workplace, call, loaded, trained, monkeypatch):
    trick = Path("trick.py").read_text()
    Path("own.py").write_text(f'{trick}\nDATA = "of_the_module"\n')
    call("run", "trick.py", "own.py")
    assert loaded == ["cifar10", "of_the_module"]
    monkeypatch.setenv("FASTCIFAR_DATA", "of_the_environment")
    call("run", "trick.py", "own.py")
    assert loaded[2:] == ["of_the_environment"]  # once for both
    call("run", "own.py", "--data", "asked_for")
    assert loaded[3:] == ["asked_for"]
    assert {record.provenance.data["source"] for record in records.find(Path("runs")).values()} > {"of_the_module"}


def test_quickstart_is_for_digits():
    [quickstart] = discover.resolve(["quickstart"], discover.default_folder())
    assert quickstart.data == "digits"


def test_published_figures_are_shown_for_what_they_are_of(workplace, call, loaded, trained):
    Path("named.py").write_text(TRICK.replace("inherited", "named"))
    assert "published for named: test 90.0 %, 9 s on one V100 (x)" in call("run", "named.py")[1]
    for other in ("--data digits", "--epochs 3", "--limit-train 70", "--set batch_size=32"):
        assert "published for" not in call("run", "named.py", *other.split())[1]
    assert "published for" not in call("run", "trick.py")[1]  # the figures of the recipe that it was made from


def test_log_is_of_the_published_kind_of_accuracy(workplace, call, loaded, trained):
    Path("tta.py").write_text(TRICK.replace('"inherited"', '"tta"').replace("source=", "tta=True, source="))
    call("run", "trick.py", "tta.py")
    last = {path.parent.name: path.read_text().split("\t")[-1] for path in Path("runs").rglob("*.tsv")}
    assert last == {"trick": "94.00", "tta": "94.50"}


def test_options_change_the_recipe(workplace, call, loaded, trained):
    options = "--epochs 4 --width 5 --dtype bfloat16 --set batch_size=32 --set optim.peak_lr=1 --seeds 3-3 --out o"
    assert call("run", "trick.py", *options.split())[0] == 0
    recipe = flatten(written("o")[3].recipe)
    names = ("num_epochs", "model.width", "compute_dtype", "batch_size", "optim.peak_lr")
    assert [recipe[name] for name in names] == [4, 5, "bfloat16", 32, 1.0]


def test_settings_come_before_the_number_of_epochs():
    """So that a schedule can be made to fit a shorter run."""
    recipe = change(bag_of_tricks.final, ["optim.schedule.flat_epochs=0.5"], epochs=2, width=None, dtype=None)
    assert recipe.optim.schedule.knots(recipe.num_epochs) == (0.0, 0.4, 1.5)


def test_every_recipe_is_checked_before_the_first_is_trained(workplace, call, loaded, trained):
    Path("large.py").write_text(TRICK.replace("batch_size=64", "batch_size=640"))
    status, _, err = call("run", "trick.py", "large.py")
    assert status == 2 and "large: batch_size 640" in err and trained[1] == []


# run --save


def test_save_makes_a_model_with_every_finished_record(workplace, call, compiled_once):
    arguments = ("run", "trick.py", "--data", "tiny.npz", "--dtype", "float32", "--seeds", "2")
    assert call(*arguments)[0] == 0 and not list(Path("runs").rglob("*.safetensors"))
    status, out, _ = call(*arguments, "--save")
    assert status == 0 and "0 skipped" in out  # a record without its model is not enough
    models = sorted(Path("runs").rglob("*.safetensors"))
    assert [path.with_suffix(".json").exists() for path in models] == [True, True]
    assert "2 skipped" in call(*arguments, "--save")[1]
    models[1].unlink()
    assert "1 skipped" in call(*arguments, "--save")[1] and models[1].exists()


def test_full_disk_leaves_neither_record_nor_model(workplace, call, compiled_once, full_disk):
    status, out, err = call("run", "trick.py", "--data", "tiny.npz", "--save", "--seeds", "2")
    assert status == 1 and err.count("\n") == 1 and "No space left" in err and ".safetensors" in err
    assert "1 of 2 seeds: 0 finished" in out and not [path for path in Path("runs").rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('"constants": {}', '"constants": {"n": jnp.zeros(1, jnp.int32)}'), "keeps 'constants/n' in int32"),
        (('"constants": {}', '"constants": {"a": {"b": jnp.zeros(1)}, "a/b": jnp.zeros(1)}'), "two arrays"),
        (("width: int = 3", "width: int = 3\n    dtype: type = jnp.float32"), "recipe.model.dtype: expected a number"),
    ],
)
def test_what_cannot_be_saved_is_not_trained(workplace, call, change, message):
    assert TRICK.count(change[0]) == 1
    Path("other.py").write_text(TRICK.replace(*change))
    status, _, err = call("run", "other.py", "--data", "tiny.npz", "--save")
    assert status == 2 and message in err and "leave out --save" in err and not Path("runs").exists()
