"""`compare` and `match-epochs` from the command line, over runs that only pretend to train."""

import json
import re
from pathlib import Path

import pytest

from fastcifar_jax.runs import records
from fastcifar_jax.runs import runner as runs
from tests.helpers_cli import TRICK, fake_make_train

NOISE = (0.0, 0.002, -0.001, 0.001, -0.002)


@pytest.fixture
def arms(workplace, loaded, monkeypatch):
    """old.py and new.py, where every epoch is worth 0.5 points and new.py is worth 1.5 epochs; yields the runs made."""
    for name in ("old", "new"):
        Path(f"{name}.py").write_text(TRICK.replace("num_epochs=2", "num_epochs=8").replace('"inherited"', f'"{name}"'))
    made = []

    def accuracy(recipe, seed):
        return 0.90 + 0.005 * (recipe.num_epochs + 1.5 * (recipe.name == "new")) + NOISE[seed % len(NOISE)]

    monkeypatch.setattr(runs, "make_train", fake_make_train(accuracy, {}, made))
    return made


def test_compare_runs_what_is_missing_in_turn_and_then_reads(arms, call):
    assert call("run", "old.py", "--seeds", "1-1")[0] == 0
    arms.clear()
    status, out, err = call("compare", "old.py", "new.py", "--seeds", "3", "--json", "answer.json")
    assert (status, err) == (0, "")
    assert arms == [("old", 0), ("new", 0), ("new", 1), ("old", 2), ("new", 2)]
    assert "new against old: higher, by +0.75 points" in out
    answer = json.loads(Path("answer.json").read_text())
    assert answer["differences"][0]["estimate"] == pytest.approx(0.75)
    arms.clear()
    status, out, err = call("compare", "old", "new")
    assert (status, err, arms) == (0, "", []) and "higher, by +0.75 points" in out


def test_compare_on_file_takes_the_options_that_tell_recipes_apart(arms, call):
    for epochs in ("4", "6"):
        call("run", "old.py", "new.py", "--seeds", "3", "--epochs", epochs)
    status, _, err = call("compare", "old", "new")
    assert status == 2 and "holds 2 recipes called old" in err and "num_epochs 4" in err
    status, out, _ = call("compare", "old.py", "new.py", "--epochs", "4")
    assert status == 0 and re.search(r"old +4 +3 ", out)


def test_compare_until_looks_after_blocks_and_stops(arms, call):
    status, out, err = call("compare", "old.py", "new.py", "--until-half-width", "0.25", "--json", "answer.json")
    answer = json.loads(Path("answer.json").read_text())
    assert (status, err) == (0, "")
    looks = re.findall(r"look (\d+), (\d+) seeds an arm: \+- ([\d.]+) at ([\d.]+) %", out)
    assert [int(n) for _, n, _, _ in looks] == [4 + 2 * i for i in range(len(looks))]
    assert [float(level) for *_, level in looks[:2]] == [97.5, 99.17]
    widths = [float(width) for _, _, width, _ in looks]
    assert widths[-1] <= 0.25 and all(width > 0.25 for width in widths[:-1]) and len(looks) > 1
    assert answer["looks"] == len(looks) and answer["overall_confidence"] == 0.95
    assert len(arms) == 2 * int(looks[-1][1])  # each seed once
    status, out, _ = call("compare", "old.py", "new.py", "--until-half-width", "0.001", "--max-seeds", "6")
    assert status == 0 and "stopped at --max-seeds 6, short of +- 0.001" in out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("compare old.py --seeds 2", "old.py is one arm; a comparison needs two"),
        ("compare old", "no record of old"),
        ("compare old.py new.py --seeds 1", "has 1 finished run; a comparison needs at least 2"),
        ("compare old.py new.py --until-half-width 0", "is not in the range x>0"),
        ("compare old.py @ --seeds 2", "is no arm"),
        ("match-epochs old.py old.py", "stand for 1 recipes; give two"),
    ],
)
def test_mistakes(arms, call, command, message):
    status, _, err = call(*command.split())
    assert status == 2 and message in err and err.startswith("error: ") and err.count("\n") == 1


def test_other_images_are_refused_unless_told(arms, call):
    call("run", "old.py", "--seeds", "2")
    call("run", "new.py", "--seeds", "2", "--limit-train", "100")
    status, _, err = call("compare", "old", "new")
    assert status == 2 and "saw different images" in err
    status, out, _ = call("compare", "old", "new", "--allow-different-data")
    assert status == 0 and "warning: these runs saw different images" in out


def test_a_star_stands_for_several(arms, call, workplace, monkeypatch):
    monkeypatch.syspath_prepend(workplace)
    folder = workplace / "tricks"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    both = TRICK.replace("RECIPE = ", "first = ").replace('"inherited"', '"made_one"')
    both += 'RECIPES = (first, dataclasses.replace(first, name="made_two"))\n'
    (folder / "many.py").write_text(both)
    status, out, err = call("compare", "made_*", "--seeds", "2", folder=folder)
    assert (status, err) == (0, "") and "made_two against made_one" in out
    assert {name for name, _ in arms} == {"made_one", "made_two"}


def test_trade_drops_epochs_until_the_gain_is_spent(arms, call):
    status, out, err = call("match-epochs", "old.py", "new.py", "--seeds", "5", "--json", "match_epochs.json")
    assert (status, err) == (0, "")
    found = json.loads(Path("match_epochs.json").read_text())
    assert [row["num_epochs"] for row in found["rows"]] == [8, 7, 6]
    assert found["equal"]["value"] == pytest.approx(6.5)
    assert found["equal"]["low"] <= 6.5 <= found["equal"]["high"]
    assert "new equals old at 6.5 epochs (95 % bootstrap interval" in out
    status, out, _ = call("match-epochs", "new.py", "old.py", "--seeds", "5")
    assert status == 0 and "old at 8 epochs is no better than new" in out


def test_torch_arms_are_kept_apart(arms, call, monkeypatch):
    class Twin:
        @staticmethod
        def versions():
            return {"torch": "9"}

        @staticmethod
        def make_train(recipe, num_classes):
            train = fake_make_train(lambda recipe, seed: 0.9 + NOISE[seed], {}, arms)(recipe, num_classes, None, None)
            unseen = lambda *seen: None
            return lambda seed, dataset: train(records_key(seed), dataset, unseen, unseen, unseen)

    def records_key(seed):
        import jax

        return jax.random.key(seed)

    monkeypatch.setattr("fastcifar_jax.cli.options.torch_twin", lambda: Twin)
    status, out, err = call("compare", "old.py", "torch:old.py", "--seeds", "3")
    assert (status, err) == (0, "") and "torch:old against old: lower" in out
    found = records.find(Path("runs"), framework="torch")
    assert len(found) == 3 and {record.versions["torch"] for record in found.values()} == {"9"}
    assert {path.parent.name for path in found} == {"torch-old"}
    status, out, _ = call("compare", "old", "torch:old")
    assert status == 0 and "torch:old against old: lower" in out
