"""The command line: what it refuses in one line, and the commands `list` and `show`."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import bag_of_tricks
from fastcifar_jax.runs import experiments as discover
from tests.helpers_cli import TRICK

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("frobnicate", "No such command 'frobnicate'"),
        ("rnu", "Did you mean 'run'"),
        ("list --colour", "No such option"),
        ("list extra", "unexpected extra argument"),
        ("show", "Missing argument 'NAME'"),
        ("show finale", "there is no experiment 'finale'; nearest: final"),
        ("show zzz", "nearest: none, see the command list"),
        ("run", "Missing argument 'NAME...'"),
        ("run bseline", "nearest: baseline"),
        ("run trick.py quikstart", "nearest: quickstart"),
        ("run missing.py", "there is no file missing.py"),
        ("run empty.py", "empty.py holds no recipes; it needs RECIPE"),
        ("run wrong.py", "wrong.py holds no recipes; it needs RECIPE"),
        ("run number.py", "number.py holds no recipes; it needs RECIPE"),
        ("run impossible.py", "batch_size is -1; give a number from 1"),
        ("run trick.py --sedes 3", "--seeds"),
        ("run trick.py --seeds 0", "'0' names no seeds; give a count such as 5"),
        ("run trick.py --seeds 9-0", "'9-0' names no seeds"),
        ("run trick.py --seeds -1", "'-1' names no seeds"),
        ("run trick.py --seeds 1-", "'1-' names no seeds"),
        ("run trick.py --seeds many", "'many' names no seeds"),
        ("run trick.py --seeds 4294967296-4294967296", "names no seeds"),
        ("run trick.py --epochs x", "'x' is not a valid integer"),
        ("run trick.py --epochs 0", "trick: num_epochs is 0; give a number from 1"),
        ("run final --epochs 2", "final: schedule knots 0, 0.4, 0 (in epochs) must increase"),
        ("run baseline --width 0", "width is 0"),
        ("run trick.py --dtype float8", "'float8' is not one of 'float32'"),
        ("run trick.py --data tiny.npz --dtype float64", "JAX_ENABLE_X64=1"),
        ("run trick.py --driver scan", "--driver is not used any more; leave it out: there is one training loop now"),
        ("run trick.py --again", "--again is not used any more; use --rerun"),
        ("compare final trick.py --until=0.1", "--until is not used any more; use --until-half-width"),
        ("trade final trick.py", "trade is not used any more; use match-epochs"),
        ("plot celu --out a.png", "plot celu is not used any more; use plot activations"),
        ("run trick.py --set optim.peek_lr=1", "nearest: optim.peak_lr"),
        ("run trick.py --set optim.peak_lr=fast", "expected float, got 'fast'"),
        ("run trick.py --set optim.peak_lr", "write name=value"),
        ("run trick.py --set optim.peak_lr=-1", "above 0"),
        ("run trick.py --data tiny.npz --set batch_size=131", "batch_size 131 is larger than the 130 training images"),
        ("run trick.py --data tiny.npz --limit-train 131", "limit_train is 131"),
        ("run trick.py --data tiny.npz --limit-train 0", "limit_train is 0"),
        ("run trick.py --data missing.npz", "missing.npz"),
        ("run trick.py --data tiny.npz --out trick.py", "is a file"),
        ("run trick.py --data tiny.npz --out trick.py/runs", "choose another --out"),
    ],
)
def test_bad_names_and_values(workplace, call, arguments, message):
    (workplace / "empty.py").write_text("")
    (workplace / "wrong.py").write_text("RECIPE = 3")
    (workplace / "number.py").write_text("RECIPES = 3")
    (workplace / "impossible.py").write_text("from fastcifar_jax.recipe import Recipe\nRECIPE = Recipe(batch_size=-1)")
    status, _, err = call(*arguments.split())
    assert status == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")
    assert message in err
    assert not (workplace / "runs").exists()


def test_list(call):
    status, out, err = call("list")
    assert (status, err) == (0, "") and "\x1b" not in out
    rows = [line.split() for line in out.splitlines() if line.strip()]
    for recipe in bag_of_tricks.RECIPES:
        assert any(row[:2] == [recipe.name, str(recipe.num_epochs)] for row in rows)
    assert ["final", "10", "94.1", "%", "TTA", "26", "s", "V100"] in rows
    assert ["pool_before_norm", "24", "94.0", "%", "50"] in rows
    assert ["baseline_e40", "40", "95.18", "%", "TTA", "5", "115.9", "s", "V100"] in rows
    titles = lambda out: [line.split(":")[0] for line in out.splitlines() if re.match(r"[a-z_]+: [A-Z]", line)]
    assert titles(out)[:2] == ["quickstart", "bag_of_tricks"] and "--all shows them" in out
    every = titles(call("list", "--all")[1])
    assert set(every) == {*titles(out), "ablation", "transfer"} and not {"ablation", "transfer"} & set(titles(out))


def test_show(call):
    status, out, err = call("show", "final")
    assert (status, err) == (0, "") and "\x1b" not in out
    rows = [line.split() for line in out.splitlines()]
    assert ["optim.peak_lr", "1.0"] in rows and ["optim.schedule.flat_epochs", "2.0"] in rows
    assert ["num_epochs", "13", "10"] in rows and ["augmentations.2", "Cutout", "None"] in rows
    assert "6,570,880 trained and 2,969 constant parameters" in out
    assert "380,008,448 multiply-accumulates" in out
    assert "94.1 % with TTA, 26 s on one V100" in out
    out = call("show", "baseline")[1]
    assert "6,573,120 trained and 0 constant" in out and "379,261,952 multiply" in out and "predecessor" not in out
    assert "none in training" in call("show", "tta_13")[1]


def test_show_a_file(workplace, call):
    status, out, _ = call("show", "trick.py")
    assert status == 0 and "Linear" in out and "30 multiply-accumulates" in out


def test_a_folder_of_experiments(workplace, call, monkeypatch, caplog):
    """Every module with recipes, a broken one left out with a warning, others not imported at all."""
    folder = workplace / "my_experiments"
    folder.mkdir()
    (folder / "one.py").write_text(TRICK)
    (folder / "broken.py").write_text("RECIPES = oops")
    (folder / "unrelated.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(workplace)
    status, out, _ = call("list", folder=folder)
    assert status == 0 and "one: A linear network, which compiles in no time." in out
    assert len(caplog.records) == 1 and "broken.py is left out: NameError" in caplog.text and "oops" in caplog.text
    assert "Usage: python -m my_experiments [OPTIONS]" in call("--help", folder=folder)[1]

    (folder / "two.py").write_text(
        TRICK.replace("RECIPE = ", "RECIPES = (").rstrip().replace('"inherited"', '"one"') + ",)"
    )
    status, _, err = call("show", "one", folder=folder)
    assert status == 2 and "'one' is declared more than once" in err


def test_no_folder_of_experiments(workplace, call, monkeypatch):
    monkeypatch.setattr(discover, "default_folder", lambda: None)
    status, _, err = call("list")
    assert status == 2 and "give the path of a file with a RECIPE" in err
    assert call("show", "trick.py")[0] == 0


def test_without_arguments_there_is_help(call):
    status, out, _ = call()
    assert status == 0 and out.startswith("Usage: python -m fastcifar_jax [OPTIONS] COMMAND")


def test_module():
    run = subprocess.run(
        [sys.executable, "-m", "experiments", "list"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "final" in run.stdout and "\x1b" not in run.stdout and run.stderr == ""
