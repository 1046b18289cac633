"""`reproduce`: the recipe from the record, the verdict, and the command on real runs of a linear network."""

import dataclasses
import json
import math
import os
from pathlib import Path

import pytest

from experiments import airbench, bag_of_tricks
from fastcifar_jax.ops import backend
from fastcifar_jax.recipe import change, flatten, resolve_dtype
from fastcifar_jax.runs import records
from fastcifar_jax.runs import runner as runs
from fastcifar_jax.runs.reproduce import BITWISE, DIFFERENT, WITHIN, compare, provenance_diff, rebuild
from tests.runs.test_records import DIVERGED, RECORD

FINAL = bag_of_tricks.final


def record_of(recipe, **changes):
    """As it would be read from a file."""
    values = json.loads(records.dumps(flatten(recipe)))
    return dataclasses.replace(RECORD, recipe=values, recipe_hash=recipe.hash, **changes)


@pytest.mark.parametrize(
    ("declared", "options"),
    [
        (FINAL, ((), None, None, None)),
        (
            FINAL,
            (
                ("optim.peak_lr=2", "model.norm.eval_first_group=True", "average=None", "mean=(125, 122.5, 113)"),
                3,
                16,
                "bfloat16",
            ),
        ),
        (bag_of_tricks.baseline, (("sampling=None",), None, None, None)),
        (
            FINAL,
            (("optim.schedule.flat_epochs=0.5", "num_epochs=1", "optim.schedule.warmup=0.4"), None, None, "float32"),
        ),
        (
            airbench.RECIPES[0],
            (("num_epochs=1.5", "optim.whiten_bias_epochs=None", "augmentations.0.padding=1"), None, 8, "mixed"),
        ),
    ],
)
def test_the_recipe_of_a_record(declared, options):
    try:
        recipe = change(declared, *options)
    except ValueError:  # a part that cannot be taken away
        recipe = resolve_dtype(declared)
    assert rebuild(declared, record_of(recipe)) == recipe


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"optim.peak_lr": 3.0}, r"has the hash \w+, the record's recipe \w+: all values are the same, but the parts"),
        ({"optim.peak_lr": None}, "optim.peak_lr is 1.0, on record None"),
        (
            {"loss": "Focal", "loss.gamma": 0.5},
            "loss is 'CrossEntropy', on record 'Focal', loss.gamma is None, on record 0.5",
        ),
        ({"model.channels": "__import__('os').system('true')"}, "model.channels is"),
    ],
)
def test_another_recipe_is_refused(values, fault):
    record = record_of(FINAL)
    with pytest.raises(ValueError, match=f"{fault}.*check out the code"):
        rebuild(FINAL, dataclasses.replace(record, recipe=record.recipe | values, recipe_hash="0" * 16))


def with_last(record, **changes):
    return dataclasses.replace(record, epochs=(*record.epochs[:-1], record.epochs[-1]._replace(**changes)))


@pytest.mark.parametrize(
    ("again", "verdict", "accuracy", "loss", "first"),
    [
        (RECORD, BITWISE, 0, 0, None),
        (with_last(RECORD, train_seconds=99.0), BITWISE, 0, 0, None),
        (with_last(RECORD, test_loss=math.nextafter(0.25, 1)), WITHIN, 0, 2.2e-14, 2),
        (with_last(RECORD, test_accuracy=0.9418), WITHIN, 0.1, 0, 2),
        (with_last(RECORD, test_accuracy=0.9419), DIFFERENT, 0.11, 0, 2),
        (with_last(RECORD, train_loss=0.4996), WITHIN, 0, 0.08, 2),
        (with_last(RECORD, train_loss=0.51), DIFFERENT, 0, 100 * 0.01 / 0.51, 2),
        (with_last(RECORD, tta_loss=math.nan), DIFFERENT, 0, math.inf, 2),
        (dataclasses.replace(RECORD, result={**RECORD.result, "tta_accuracy": 0.5}), DIFFERENT, 44.5, 0, 2),
        (dataclasses.replace(RECORD, epochs=RECORD.epochs[:1]), DIFFERENT, pytest.approx(19.08, abs=99), 0, None),
        (dataclasses.replace(RECORD, status="crashed", result=None), DIFFERENT, 0, 0, None),
    ],
)
def test_verdict(again, verdict, accuracy, loss, first):
    answer = compare(RECORD, again, 0.1 + 1e-9)
    assert answer["verdict"] == verdict and answer["first_epoch"] == first
    assert answer["largest"]["accuracy"] == pytest.approx(accuracy)
    assert answer["largest"]["loss"] == pytest.approx(loss, rel=0.02)


def test_losses_that_are_not_finite_are_equal_to_each_other():
    [row] = DIVERGED.epochs
    nan = dataclasses.replace(
        DIVERGED, epochs=(row._replace(train_loss=math.inf, test_loss=math.nan, tta_loss=math.nan),)
    )
    assert compare(DIVERGED, nan, 0)["verdict"] == BITWISE


def test_what_was_made_otherwise():
    again = dataclasses.replace(
        RECORD, versions={"python": "3.12", "torch": "2"}, device={**RECORD.device, "cores": 4}, conv="onednn",
        data={**RECORD.data, "hash": "f"}, source_hash="cd", driver="scan",
    )  # fmt: skip
    assert provenance_diff(RECORD, RECORD) == {}
    assert provenance_diff(RECORD, again) == {
        "source code": ["ab", "cd"],
        "conv": ["lax", "onednn"],
        "driver": ["python", "scan"],
        "versions: python": ["3.11", "3.12"],
        "versions: torch": [None, "2"],
        "device: cores": [2, 4],
        "data: hash": ["0123456789abcdef", "f"],
    }


RUN = ("run", "trick.py", "--data", "tiny.npz", "--limit-train", "128", "--set", "optim.peak_lr=0.05", "--epochs", "3")
AGAIN = ("--experiment", "trick.py")


def only_record():
    [path] = Path("runs").glob("*/*.json")
    return path


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def made(workplace, call, trained):
    """The path of a record of trick.py, seed 4; neither it nor its rerun is trained."""
    assert call(*RUN, "--seeds", "4-4")[0] == 0
    return only_record()


def test_a_run_is_bitwise_the_same_and_leaves_nothing(workplace, call):
    assert call(*RUN, "--seeds", "4-4")[0] == 0
    files = lambda: {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}
    before = files()
    status, out, err = call("reproduce", str(only_record()), *AGAIN, "--json", "answer.json")
    assert (status, err) == (0, "")
    assert "trick, seed 4: bitwise equal: 20 losses and accuracies of 3 epochs are the same to the last bit" in out
    assert "made alike: versions, device, data, source code" in out
    assert before == files()
    answer = json.loads(Path("answer.json").read_text())
    assert answer["verdict"] == BITWISE and answer["numbers"] == 20 and answer["provenance_diff"] == {}
    assert (answer["seed"], answer["experiment"], answer["framework"]) == (4, "trick", "jax")


def test_a_diverged_run_diverges_again(workplace, call):
    assert call("run", "trick.py", "--data", "tiny.npz", "--set", "optim.peak_lr=1e38")[0] == 1
    status, out, err = call("reproduce", str(only_record()), *AGAIN)
    assert (status, err) == (0, "") and "bitwise equal" in out and records.read(only_record()).status == "diverged"


def test_an_altered_record(made, call):
    fields = json.loads(made.read_text())
    fields["epochs"][0]["train_accuracy"] += 0.05
    edit(made, epochs=fields["epochs"], versions={**fields["versions"], "jax": "0.0.1"}, conv="abacus")
    status, out, _ = call("reproduce", str(made), *AGAIN)
    assert status == 1 and "different: of 8 numbers, accuracies differ by up to 5 points" in out
    assert "from epoch 1 on" in out and "versions: jax   0.0.1" in out and "conv            abacus" in out
    status, out, _ = call("reproduce", str(made), *AGAIN, "--tolerance", "5.001", "--json", "a.json")
    assert status == 0 and "equal within tolerance" in out
    assert json.loads(Path("a.json").read_text())["tolerance"] == 5.001


def test_seed_driver_recipe_and_convolutions_are_those_on_record(made, call, monkeypatch):
    asked = []
    make_train = runs.make_train

    def spy(recipe, num_classes, driver, compiled):
        asked.append((recipe.optim.peak_lr, recipe.num_epochs, driver, backend.conv_backend()[0]))
        return make_train(recipe, num_classes, driver, compiled)

    monkeypatch.setattr(runs, "make_train", spy)
    monkeypatch.delenv("FASTCIFAR_CONV", raising=False)
    for driver in ("scan", "python"):
        edit(made, driver=driver, conv="lax")
        status, out, _ = call("reproduce", str(made), *AGAIN)
        assert status == 0 and "trick, seed 4: bitwise equal" in out and "128 training" in out
    assert asked == [(0.05, 3, "scan", "lax"), (0.05, 3, "python", "lax")]
    assert "FASTCIFAR_CONV" not in os.environ


def test_data_elsewhere_and_other_data(made, call):
    Path("tiny.npz").rename("moved.npz")
    status, _, err = call("reproduce", str(made), *AGAIN)
    assert status == 2 and "the data of the record (--data names others): there is no file or folder tiny.npz" in err
    status, out, _ = call("reproduce", str(made), *AGAIN, "--data", "moved.npz")
    assert status == 0 and "data: source" in out and "data: hash" not in out
    status, out, _ = call("reproduce", str(made), *AGAIN, "--data", "digits")
    assert "data: hash" in out and "data: test" in out and "data: train" not in out


@pytest.mark.parametrize(
    ("changes", "arguments", "fault"),
    [
        ({"status": "crashed", "result": None, "error": "the cat"}, (), "crashed (the cat), so there are no results"),
        ({"seed": -1}, (), "has the seed -1"),
        ({"seed": 2**32}, (), "has the seed 4294967296"),
        ({"framework": "abacus"}, (), "framework 'abacus'"),
        ({"driver": "abacus"}, (), "driver 'abacus'"),
        ({}, ("--experiment", "final"), "with the values of the record has the hash"),
        ({}, (*AGAIN, "--tolerance", "-1"), "Invalid value for '--tolerance'"),
        ({"recipe_hash": "0" * 16}, AGAIN, "all values are the same, but the parts print otherwise"),
        ({"data": {"source": "tiny.npz", "hash": "", "train": 10**9, "test": 20}}, AGAIN, "limit_train is 1000000000"),
        ({"experiment": "*"}, (), "0 recipes are called '*' here; its command names trick.py; name the record's with"),
        ({"framework": "torch"}, AGAIN, "torch"),  # it is not there, or does not know the network
        ({"epochs": None}, (), "epochs and command must be lists"),
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
    assert status == 2 and "nothing.json is no record of a run: No such file" in err
