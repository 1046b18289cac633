"""Strict dtypes and ranks for every test, the `--slow` gate, and a workplace for the commands."""

import jax
import numpy as np
import pytest

from fastcifar_jax.cli import app as cli
from fastcifar_jax.data import load as data
from fastcifar_jax.hparams import program_key
from fastcifar_jax.runs import runner
from fastcifar_jax.train import compile_run
from tests.helpers_cli import TRICK, pretend_to_train, train_and_test

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        skip = pytest.mark.skip(reason="takes minutes; run with --slow")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip)


@pytest.fixture
def key():
    """One typed key; tests split it where they need more."""
    return jax.random.key(0)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with trick.py and tiny.npz, where nothing says which data to use."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FASTCIFAR_DATA", raising=False)
    (tmp_path / "trick.py").write_text(TRICK)
    dataset = train_and_test()
    names = ("x_train", "y_train", "x_test", "y_test")
    np.savez(tmp_path / "tiny.npz", **dict(zip(names, dataset, strict=True)))
    return tmp_path


@pytest.fixture
def call(capsys):
    """Runs the command line: `(status, stdout, stderr)`."""

    def call(*arguments, folder=None):
        with pytest.raises(SystemExit) as end:
            cli.main(list(arguments), folder)
        return end.value.code, *capsys.readouterr()

    return call


@pytest.fixture
def loaded(monkeypatch):
    """Any source yields the same small data set; the fixture is the list of what was asked for."""
    asked = []

    def load(source, *, limit_train=None):
        asked.append(source)
        dataset = train_and_test(limit_train or 130)
        info = data.DataInfo(source, "f00dfacecafe", tuple("abcdefghij"), len(dataset[0]), len(dataset[2]))
        return dataset, info

    monkeypatch.setattr(data, "load_data", load)
    return asked


@pytest.fixture
def trained(monkeypatch):
    """Runs end at once; the fixture maps a seed to what its run raises, and lists the seeds that were trained."""
    raises, seeds = {}, []
    pretend_to_train(monkeypatch, lambda recipe, seed: (94 + seed) / 100, raises, seeds)
    return raises, seeds


@pytest.fixture
def at_epoch(monkeypatch):
    """`at_epoch(k, action)`: what happens once, after epoch k of a run was shown and before the next one starts."""
    snapshots = runner._snapshots

    def at_epoch(epoch, action):
        def with_action(*args):
            for snapshot in snapshots(*args):
                yield snapshot
                if len(snapshot.epochs) == epoch:
                    monkeypatch.setattr(runner, "_snapshots", snapshots)
                    action()

        monkeypatch.setattr(runner, "_snapshots", with_action)

    return at_epoch


@pytest.fixture(scope="session")
def compiled_runs():
    """What `compiled_once` has compiled."""
    return {}


@pytest.fixture
def compiled_once(monkeypatch, compiled_runs):
    """Real commands whose recipe is compiled for the first of them only."""

    def compile_once(recipe, num_classes, dataset, **options):
        key = (program_key(recipe), num_classes, *(array.shape for array in dataset), *options.values())
        if key not in compiled_runs:
            compiled_runs[key] = compile_run(recipe, num_classes, dataset, **options)
        return compiled_runs[key]

    monkeypatch.setattr(runner, "compile_run", compile_once)


@pytest.fixture(scope="module")
def torch_on_one_thread():
    """PyTorch for networks so tiny that two threads would wait for each other."""
    torch = pytest.importorskip("torch", reason='needs PyTorch: pip install -e ".[compare]"')
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch
    torch.set_num_threads(threads)
