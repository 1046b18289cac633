"""`compare` and `match-epochs` from the command line, over runs that only pretend to train."""

import json
import re
from pathlib import Path

import jax
import pytest

from fastcifar_jax.runs import records
from fastcifar_jax.train import Diverged
from fastcifar_jax.types import EpochInfo
from tests.helpers_cli import TRICK, fake_train_epochs, pretend_to_train

NOISE = (0.0, 0.002, -0.001, 0.001, -0.002)


@pytest.fixture
def made(workplace, loaded, monkeypatch):
    """old.py and new.py, where an epoch is worth 0.5 pp and new.py is worth 1.5 epochs; the list of runs made."""
    for name in ("old", "new"):
        Path(f"{name}.py").write_text(TRICK.replace("num_epochs=2", "num_epochs=8").replace('"inherited"', f'"{name}"'))
    made = []

    def accuracy(recipe, seed):
        return 0.90 + 0.005 * (recipe.num_epochs + 1.5 * (recipe.name == "new")) + NOISE[seed % len(NOISE)]

    pretend_to_train(monkeypatch, accuracy, {}, made)
    return made


def test_compare_runs_what_is_missing_in_turn_and_then_reads(made, call):
    assert call("run", "old.py", "--seeds", "1-1")[0] == 0
    made.clear()
    options = ("--threshold", "94", "--equivalence-margin", "0.1", "--min-effect", "0.1", "--json", "answer.json")
    status, out, err = call("compare", "old.py", "new.py", "--seeds", "3", *options)
    assert (status, err) == (0, "")
    assert made == [("old", 0), ("new", 0), ("new", 1), ("old", 2), ("new", 2)]
    for text in (
        "tta accuracy: mean and 95 % interval (t) of each arm",
        "cifar10, 130 training and 20 test images, hash f00dface; ",
        "jax " + jax.__version__,
        "new against old: higher, by +0.75 pp (95 % interval ",
        "; not shown to be equivalent within +- 0.1 pp (p ",
    ):
        assert text in out
    assert re.search(r"; to show 0\.1 pp would take \d+ runs per arm \(80 % power\)", out)
    assert re.search(r"new +8 +3 +0 +95\.28 .* 100% *\n", out)
    answer = json.loads(Path("answer.json").read_text())
    assert answer["differences"][0]["estimate"] == pytest.approx(0.75)
    made.clear()
    status, out, err = call("compare", "old", "new")
    assert (status, err, made) == (0, "", []) and "higher, by +0.75 pp" in out


def test_runs_that_diverged_are_counted(made, call, monkeypatch):
    diverged = Diverged("old", (EpochInfo(*[1] * 8),))
    pretend_to_train(monkeypatch, lambda recipe, seed: 0.9, {1: diverged}, made)
    status, out, _ = call("compare", "old.py", "new.py", "--seeds", "3", "--metric", "train_seconds")
    assert status == 0 and re.search(r"old +8 +2 +1 ", out)
    assert re.search(
        r"new against old: no difference shown: [+-]0\.00 s \(95 % interval .*\n2 runs did not finish", out
    )


def test_compare_on_record_takes_the_options_that_tell_recipes_apart(made, call):
    for epochs in ("4", "6"):
        call("run", "old.py", "new.py", "--seeds", "3", "--epochs", epochs)
    status, _, err = call("compare", "old", "new")
    assert status == 2 and "holds 2 recipes called old" in err and "num_epochs 4" in err
    status, out, _ = call("compare", "old.py", "new.py", "--epochs", "4")
    assert status == 0 and re.search(r"old +4 +3 ", out)


def test_compare_until_looks_after_blocks_and_stops(made, call):
    status, out, err = call("compare", "old.py", "new.py", "--until-half-width", "0.25", "--json", "answer.json")
    answer = json.loads(Path("answer.json").read_text())
    assert (status, err) == (0, "")
    looks = re.findall(r"look (\d+), (\d+) seeds per arm: \+- ([\d.]+) at ([\d.]+) %", out)
    assert [int(n) for _, n, _, _ in looks] == [4 + 2 * i for i in range(len(looks))]
    assert [float(level) for *_, level in looks[:2]] == [97.5, 99.17]
    widths = [float(width) for _, _, width, _ in looks]
    assert widths[-1] <= 0.25 and all(width > 0.25 for width in widths[:-1]) and len(looks) > 1
    assert answer["looks"] == len(looks) and answer["overall_confidence"] == 0.95
    assert len(made) == 2 * int(looks[-1][1])  # each seed once
    status, out, _ = call("compare", "old.py", "new.py", "--until-half-width", "0.001", "--max-seeds", "6")
    assert status == 0 and "stopped at --max-seeds 6, before the intervals were +- 0.001" in out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("compare old.py --seeds 2", "old.py is one arm; a comparison needs two"),
        ("compare old", "no record of old"),
        ("compare old.py new.py --seeds 1", "has 1 finished run; a comparison needs at least 2"),
        ("compare old.py new.py --until-half-width 0", "is not in the range x>0"),
        ("compare old.py @ --seeds 2", "is not an arm"),
        ("match-epochs old.py old.py", "stand for 1 recipes; give two"),
    ],
)
def test_mistakes(made, call, command, message):
    status, _, err = call(*command.split())
    assert status == 2 and message in err and err.startswith("error: ") and err.count("\n") == 1


def test_other_images_are_refused_unless_allowed(made, call):
    call("run", "old.py", "--seeds", "2")
    call("run", "new.py", "--seeds", "2", "--limit-train", "100")
    status, _, err = call("compare", "old", "new")
    assert status == 2 and "saw different images" in err
    status, out, _ = call("compare", "old", "new", "--allow-different-data")
    assert status == 0 and "warning: these runs saw different images" in out


def test_a_star_stands_for_several(made, call, workplace, monkeypatch):
    monkeypatch.syspath_prepend(workplace)
    folder = workplace / "tricks"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    both = TRICK.replace("RECIPE = ", "first = ").replace('"inherited"', '"made_one"')
    both += 'RECIPES = (first, dataclasses.replace(first, name="made_two"))\n'
    (folder / "many.py").write_text(both)
    for more in (("--seeds", "2"), ()):
        status, out, err = call("compare", "made_*", *more, folder=folder)
        assert (status, err) == (0, "") and "made_two against made_one: no difference shown: +0.00 pp" in out
    assert made == [("made_one", 0), ("made_two", 0), ("made_two", 1), ("made_one", 1)]


def test_match_epochs_drops_epochs_until_the_gain_is_spent(made, call):
    status, out, err = call("match-epochs", "old.py", "new.py", "--seeds", "5", "--json", "answer.json")
    assert (status, err) == (0, "")
    answer = json.loads(Path("answer.json").read_text())
    assert [arm["num_epochs"] for arm in answer["arms"]] == [8, 8, 7, 6]
    assert [d["of"] for d in answer["differences"]] == [f"new, {n} epochs" for n in (8, 7, 6)]
    assert answer["equal"]["value"] == pytest.approx(6.5)
    assert answer["equal"]["low"] <= 6.5 <= answer["equal"]["high"]
    assert "new equals old at 6.5 epochs (95 % bootstrap interval" in out
    status, out, _ = call("match-epochs", "new.py", "old.py", "--seeds", "5")
    assert status == 0 and "old at 8 epochs is not better than new" in out


def test_torch_arms_are_kept_apart(made, call, monkeypatch):
    class Twin:
        check_trainable = staticmethod(lambda recipe: None)
        versions = staticmethod(lambda: {"torch": "9"})
        warm_up = staticmethod(lambda recipe, num_classes, dataset: 1.0)
        train_epochs = staticmethod(fake_train_epochs(lambda recipe, seed: 0.9 + NOISE[seed], {}, made))

    monkeypatch.setattr("fastcifar_jax.cli.options.twin_of", {"jax": None, "torch": Twin}.get)
    status, out, err = call("compare", "old.py", "torch:old.py", "--seeds", "3")
    assert (status, err) == (0, "") and "torch:old against old: lower" in out and "torch 9" in out
    found = records.find(Path("runs"), framework="torch")
    assert len(found) == 3 and {path.parent.name for path in found} == {"torch-old"}
    status, out, _ = call("compare", "old", "torch:old")
    assert status == 0 and "torch:old against old: lower" in out
