"""The command `reproduce` on runs of a linear network."""

import json
import os
from pathlib import Path

import pytest

from fastcifar_jax.ops import backend
from fastcifar_jax.runs import records, runner
from fastcifar_jax.runs.reproduce import BITWISE
from tests.helpers_records import edit

RUN = ("run", "trick.py", "--data", "tiny.npz", "--limit-train", "128", "--set", "optim.peak_lr=0.05", "--epochs", "3")
BY_FILE = ("--experiment", "trick.py")


def only_record():
    [path] = Path("runs").glob("*/*.json")
    return path


@pytest.fixture
def made(workplace, call, trained):
    """The path of a record of trick.py, seed 4; neither it nor its rerun is trained."""
    assert call(*RUN, "--seeds", "4-4")[0] == 0
    return only_record()


def test_a_run_is_bitwise_the_same_and_leaves_nothing(workplace, call, compiled_once):
    assert call(*RUN, "--seeds", "4-4")[0] == 0
    files = lambda: {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}
    before = files()
    status, out, err = call("reproduce", str(only_record()), *BY_FILE, "--json", "answer.json")
    assert (status, err) == (0, "")
    assert "trick, seed 4: bitwise equal: 16 losses and accuracies of 3 epochs are the same to the last bit" in out
    assert "same provenance: versions, device, data, source code" in out
    assert before == files()
    answer = json.loads(Path("answer.json").read_text())
    assert answer["verdict"] == BITWISE and answer["numbers"] == 16 and answer["provenance_diff"] == {}
    assert (answer["seed"], answer["experiment"], answer["framework"]) == (4, "trick", "jax")


def test_evaluation_is_that_of_the_record(workplace, call, compiled_once):
    assert call(*RUN, "--seeds", "4-4", "--tta-every-epoch")[0] == 0
    assert "bitwise equal: 20 losses and accuracies" in call("reproduce", str(only_record()), *BY_FILE)[1]


def test_a_diverged_run_diverges_again(workplace, call, compiled_once):
    assert call(*RUN, "--set", "optim.peak_lr=1e38")[0] == 1
    status, out, err = call("reproduce", str(only_record()), *BY_FILE)
    assert (status, err) == (0, "") and "bitwise equal" in out and records.read(only_record()).status == "diverged"


def test_an_altered_record(made, call):
    fields = json.loads(made.read_text())
    fields["epochs"][0]["train_accuracy"] += 0.05
    versions = {**fields["provenance"]["versions"], "jax": "0.0.1"}
    edit(made, epochs=fields["epochs"], versions=versions, conv="abacus")
    status, out, _ = call("reproduce", str(made), *BY_FILE)
    assert status == 1 and "different: of 8 numbers, accuracies differ by up to 5 pp" in out
    assert "from epoch 1 on" in out and "versions.jax" in out and "0.0.1" in out and "abacus" in out
    status, out, _ = call("reproduce", str(made), *BY_FILE, "--tolerance", "5.001", "--json", "a.json")
    assert status == 0 and "equal within tolerance" in out
    assert json.loads(Path("a.json").read_text())["tolerance"] == 5.001


def test_seed_recipe_and_convolutions_are_those_on_record(made, call, monkeypatch):
    asked = []
    train_epochs = runner.train_epochs

    def spy(recipe, *arguments, **options):
        asked.append((recipe.optim.peak_lr, recipe.num_epochs, backend.conv_backend()[0]))
        return train_epochs(recipe, *arguments, **options)

    monkeypatch.setattr(runner, "train_epochs", spy)
    monkeypatch.delenv("FASTCIFAR_CONV", raising=False)
    edit(made, conv="lax")
    status, out, _ = call("reproduce", str(made), *BY_FILE)
    assert status == 0 and "trick, seed 4: bitwise equal" in out and "128 training" in out
    assert asked == [(0.05, 3, "lax")]
    assert "FASTCIFAR_CONV" not in os.environ


def test_data_elsewhere_and_other_data(made, call):
    Path("tiny.npz").rename("moved.npz")
    status, _, err = call("reproduce", str(made), *BY_FILE)
    assert status == 2 and "the data of the record (--data names others): there is no file or folder tiny.npz" in err
    status, out, _ = call("reproduce", str(made), *BY_FILE, "--data", "moved.npz")
    assert status == 0 and "data.source" in out and "data.hash" not in out
    status, out, _ = call("reproduce", str(made), *BY_FILE, "--data", "digits")
    assert "data.hash" in out and "data.test" in out and "data.train" not in out


@pytest.mark.parametrize(
    ("changes", "arguments", "fault"),
    [
        ({"status": "crashed", "result": None, "error": "the cat"}, (), "crashed (the cat), so there are no results"),
        ({"seed": -1}, (), "has the seed -1"),
        ({"seed": 2**32}, (), "has the seed 4294967296"),
        ({"framework": "abacus"}, (), "framework: expected one of jax, torch, got 'abacus'"),
        (
            {},
            ("--experiment", "final"),
            "recipe.model: expected a dict whose type is one of ResNet9, AirNet, got",
        ),
        ({}, (*BY_FILE, "--tolerance", "-1"), "Invalid value for '--tolerance'"),
        ({"recipe_hash": "0" * 16}, BY_FILE, "on record 0000000000000000; check out the code"),
        ({"data": {"source": "tiny.npz", "hash": "", "train": 1000, "test": 2}}, BY_FILE, "limit_train is 1000; tiny"),
        ({"experiment": "*"}, (), "0 recipes here are called '*'; its command names trick.py; give the record's"),
        ({"framework": "torch"}, BY_FILE, "torch"),  # it is not there, or does not know the network
        ({"epochs": None}, (), "epochs: expected tuple[EpochInfo, ...], got None"),
    ],
)
def test_refused(made, call, changes, arguments, fault):
    edit(made, **changes)
    status, _, err = call("reproduce", str(made), *arguments)
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1 and fault in err


def test_no_file_is_run_because_a_record_names_it(made, call):
    Path("evil.py").write_text("from pathlib import Path\nPath('was_executed').touch()\n")
    command = ["run", "evil.py", "torch:evil.py"]
    edit(made, experiment="evil.py", command=command, recipe_repr="__import__('pathlib').Path('was_executed').touch()")
    status, _, err = call("reproduce", str(made))
    assert status == 2 and "its command names evil.py, torch:evil.py" in err and not Path("was_executed").exists()


def test_experiments_of_the_folder_are_found_by_name(workplace, call, trained, monkeypatch):
    folder = workplace / "attempts"
    folder.mkdir()
    Path("trick.py").rename(folder / "mine.py")
    monkeypatch.syspath_prepend(workplace)
    assert call("run", "mine", "--data", "tiny.npz", folder=folder)[0] == 0
    status, out, err = call("reproduce", str(only_record()), folder=folder)
    assert (status, err) == (0, "") and "mine, seed 0: bitwise equal" in out


@pytest.mark.usefixtures("torch_on_one_thread")
def test_a_record_of_the_pytorch_twin(workplace, call):
    Path("narrow.py").write_text(
        "from dataclasses import replace\nfrom experiments.bag_of_tricks import baseline\n"
        "RECIPE = replace(baseline, num_epochs=1, batch_size=64)\n"
    )
    assert call("run", "torch:narrow.py", "--data", "tiny.npz", "--width", "4", "--dtype", "float32")[0] == 0
    status, out, err = call("reproduce", str(only_record()), "--experiment", "narrow.py", "--tolerance", "1")
    assert (status, err) == (0, "") and "torch:narrow, seed 0: " in out and "0 epochs" not in out


def test_a_record_that_is_not_there(workplace, call):
    status, _, err = call("reproduce", "nothing.json")
    assert status == 2 and "nothing.json is not a record of a run: No such file" in err
