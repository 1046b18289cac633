"""Saved models: what is loaded predicts what was trained, and the commands that use it."""

import itertools
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from fastcifar_jax.analysis.calibration import measure
from fastcifar_jax.averaging import Ema
from fastcifar_jax.cli import app as cli
from fastcifar_jax.data import load as data
from fastcifar_jax.evaluate import NoTTA, SixViewTTA, evaluate
from fastcifar_jax.functions import eval_variables
from fastcifar_jax.losses import CrossEntropy
from fastcifar_jax.models.airnet import AirNet
from fastcifar_jax.models.base import PRECISIONS
from fastcifar_jax.recipe import Recipe
from fastcifar_jax.runs import experiments, records
from fastcifar_jax.runs.saved_model import SavedModel, SavedModelError, load_model, of_run, save_model
from fastcifar_jax.train import make_train
from fastcifar_jax.types import Dataset
from tests.helpers_cli import TRICK, train_and_test

RESNET9 = """
from dataclasses import replace
from experiments.bag_of_tricks import final

norm = replace(final.model.norm, num_groups=2)
optim = replace(final.optim, peak_lr=0.1, schedule=replace(final.optim.schedule, flat_epochs=0.5))
model = replace(final.model, norm=norm, res_layers=("layer3",)).with_width(2)
RECIPE = replace(final, num_epochs=2, batch_size=64, model=model, optim=optim, compute_dtype="mixed")
"""
SMOOTHING = 0.2  # in its loss


def write_npz(path, dataset):
    np.savez(path, **dict(zip(("x_train", "y_train", "x_test", "y_test"), dataset, strict=True)))
    return str(path)


class Run(NamedTuple):
    path: Path  # of the model
    record: records.Record
    source: str
    dataset: Dataset
    info: data.DataInfo
    model: SavedModel
    logits: tuple[np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A real run with --save, and what its model gives; the test set is a whole chunk and a part of one."""
    folder = tmp_path_factory.mktemp("resnet9")
    (folder / "resnet9.py").write_text(RESNET9)
    source = write_npz(folder / "tiny.npz", train_and_test(130, 520))
    arguments = ["run", str(folder / "resnet9.py"), "--save", "--data", source, "--out", str(folder / "runs")]
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 0
    [(path, record)] = records.find(folder / "runs").items()
    path = path.with_suffix(".safetensors")
    model = load_model(path)
    dataset, info = data.load_data(source)
    return Run(path, record, source, dataset, info, model, model.logits(dataset.test_images))


def test_equals_the_record(run):
    labels, model, record = run.dataset.test_labels, run.model, run.record
    for name, found in zip(("test", "tta"), run.logits, strict=True):
        assert (found.argmax(-1) == labels).sum() / len(labels) == record.result[f"{name}_accuracy"]
        assert getattr(model, f"{name}_accuracy") == record.result[f"{name}_accuracy"]
        loss = CrossEntropy(SMOOTHING)(jnp.asarray(found), jnp.asarray(labels)).mean()
        np.testing.assert_allclose(loss, getattr(record.epochs[-1], f"{name}_loss"), rtol=1e-6)
    assert (run.logits[0] != run.logits[1]).any()

    assert (model.recipe.name, model.recipe.hash, model.seed) == (record.experiment, record.recipe_hash, 0)
    assert repr(model.recipe) == record.recipe_repr and model.classes == run.info.classes
    assert (model.data_source, model.data_hash) == (run.source, record.provenance.data["hash"])
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(model.variables))


def test_predicts_with_its_augmentation(run):
    probabilities = run.model.predict(run.dataset.test_images[:2])
    # A chunk of another size may round differently, here to bfloat16.
    np.testing.assert_allclose(probabilities, jax.nn.softmax(run.logits[1][:2]), atol=1e-2)


def test_saved_again_it_is_the_same_file(run, tmp_path):
    save_model(run.model, tmp_path / "again.safetensors")
    [path] = tmp_path.iterdir()
    assert path.read_bytes() == run.path.read_bytes()


@pytest.mark.parametrize("compute_dtype", ["float32", "float16"])
def test_airnet_equals_training(compute_dtype, tmp_path):
    """Random weights, as evaluated in training and from a file."""
    recipe = Recipe(model=AirNet(channels=(2, 4, 4)), tta=NoTTA(), compute_dtype=compute_dtype)
    dataset = train_and_test(512)
    model = recipe.model(10, compute_dtype)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    rng = np.random.default_rng(0)  # in a range that float16 holds
    variables = jax.tree.map(lambda x: jnp.asarray(rng.uniform(0.1, 0.2, x.shape), x.dtype), variables)

    @jax.jit
    def evaluated(variables, images, labels):
        predict = lambda images: model.apply(variables, images, False)[0]
        dtype = PRECISIONS[compute_dtype].images
        return evaluate(predict, recipe.loss, recipe.tta, images, labels, recipe.mean, recipe.std, dtype)

    info = data.DataInfo("random", "f00d", tuple("abcdefghij"), 512, 20)
    save_model(of_run(recipe, info, dataset, 0, variables, (0.5, 0.5)), tmp_path / "a.safetensors")
    logits, _ = load_model(tmp_path / "a.safetensors").logits(dataset.test_images)
    sums = evaluated(variables, dataset.test_images, dataset.test_labels)
    assert (logits.argmax(-1) == dataset.test_labels).sum() == sums.test_correct
    loss = recipe.loss(jnp.asarray(logits), jnp.asarray(dataset.test_labels)).sum()
    np.testing.assert_allclose(loss, sums.test_loss, rtol=1e-6)


# A user's own network, which compiles in no time.


@pytest.fixture(scope="module")
def trained_trick(tmp_path_factory):
    """`(recipe, data, info, state)` of a linear network with six views, whose weights are averaged."""
    folder = tmp_path_factory.mktemp("trick")
    (folder / "trick.py").write_text(TRICK)
    [experiment] = experiments.resolve((str(folder / "trick.py"),), None)
    recipe = replace(experiment.recipe, tta=SixViewTTA(), average=Ema(0.9, 1), compute_dtype="float32")
    dataset, info = data.load_data(write_npz(folder / "tiny.npz", train_and_test()))
    return recipe, dataset, replace(info, source="tiny.npz"), make_train(recipe, 10)(jax.random.key(0), dataset).state


@pytest.fixture
def trick(workplace, trained_trick):
    return trained_trick


def model_of(trick, **changes):
    recipe, dataset, info, state = trick
    return replace(of_run(recipe, info, dataset, 3, eval_variables(state), (0.25, 0.5)), **changes)


def test_round_trip_is_bitwise_and_of_the_averaged_weights(trick):
    recipe, dataset, _, state = trick
    save_model(model_of(trick), Path("deep/folder/a.safetensors"))
    model = load_model("deep/folder/a.safetensors", recipe)
    chex.assert_trees_all_equal(model.variables, eval_variables(state))
    chex.assert_trees_all_equal(model.variables["params"], state.average["params"])
    assert (model.variables["params"]["w"] != state.params["w"]).any()
    assert (model.seed, model.test_accuracy, model.tta_accuracy) == (3, 0.25, 0.5)
    assert model.recipe == recipe
    mean, std = (np.array(x, np.float32) for x in (recipe.mean, recipe.std))
    expected = ((dataset.test_images - mean) / std).mean((1, 2)) @ np.asarray(state.average["params"]["w"])
    np.testing.assert_allclose(model.logits(dataset.test_images)[0], expected, atol=1e-5)


@pytest.mark.parametrize("num_images", [0, 1, 3, 501])
def test_predicts_any_number_of_images(trick, num_images):
    images = np.random.default_rng(1).integers(0, 256, (num_images, 32, 32, 3), np.uint8)
    model = model_of(trick)
    found = model.predict(jnp.asarray(images))
    assert found.dtype == np.float32 and found.shape == (num_images, 10)
    if num_images:
        np.testing.assert_allclose(found, jax.nn.softmax(model.logits(images)[1]), rtol=1e-5)


def test_own_network_comes_from_the_caller(trick, call):
    recipe = trick[0]
    save_model(model_of(trick), Path("a.safetensors"))
    with pytest.raises(SavedModelError, match=r"a\.safetensors: recipe\.model: .*'Linear', .*recipe=my_recipe"):
        load_model("a.safetensors")
    wide = replace(recipe, model=recipe.model.with_width(4))
    assert load_model("a.safetensors", wide).recipe == recipe  # the class is the caller's, its values are the file's
    status, _, err = call("evaluate", "a.safetensors", "--data", "tiny.npz")
    assert status == 2 and err.endswith("or --recipe\n") and err.count("\n") == 1
    status, out, _ = call("evaluate", "a.safetensors", "--data", "tiny.npz", "--recipe", "trick.py")
    assert status == 0 and "20 images" in out
    status, _, err = call("predict", "a.safetensors", "a.png", "--recipe", "final*")
    assert status == 2 and "declares" in err and "give one" in err


def test_other_images_are_refused(trick):
    model = model_of(trick)
    uint8 = lambda *shape: np.zeros(shape, np.uint8)
    for images in (np.zeros((2, 32, 32, 3)), uint8(32, 32, 3), uint8(2, 3, 32, 32), [[0]]):
        for method in (model.predict, model.logits):
            with pytest.raises(ValueError, match=r"expected uint8 \(n, 32, 32, 3\)"):
                method(images)
    with pytest.raises(ValueError, match="give at least one"):
        model.logits(uint8(0, 32, 32, 3))


def test_logits_must_be_finite(trick):
    variables = {"params": {"w": jnp.full((3, 10), 3e38)}, "constants": {}, "batch_stats": {}}
    model = model_of(trick, variables=variables)
    for method in (model.predict, model.logits):
        with pytest.raises(SavedModelError, match="not finite"):
            method(np.full((1, 32, 32, 3), 255, np.uint8))


def test_data_of_more_classes_are_refused_and_of_other_names_pointed_out(trick, call):
    save_model(model_of(trick, classes=tuple("abcdefghij")), Path("a.safetensors"))
    arguments = ("evaluate", "a.safetensors", "--recipe", "trick.py", "--data")
    assert "names its classes differently" in call(*arguments, "tiny.npz")[1]
    dataset = train_and_test()
    dataset.test_labels[0] = 10
    status, _, err = call(*arguments, write_npz("more.npz", dataset))
    assert status == 2 and "has 11 classes, the model 10" in err


def test_many_classes_show_their_commonest_confusions(trick, call):
    recipe, dataset, info, _ = trick
    variables = {"params": {"w": jnp.zeros((3, 30))}, "constants": {}, "batch_stats": {}}
    info = replace(info, classes=tuple(f"class{i}" for i in range(30)))
    save_model(of_run(recipe, info, dataset, 0, variables, (0.0, 0.0)), Path("a.safetensors"))
    out = call("evaluate", "a.safetensors", "--recipe", "trick.py", "--data", "tiny.npz")[1]
    counts = np.bincount(dataset.test_labels)  # all are taken for class 0
    rows = [line.split() for line in out.splitlines()]
    assert all([f"class{i}", "class0", str(n)] in rows for i, n in enumerate(counts) if i and n)


def test_evaluate_command(trick, call):
    recipe, dataset, info, _ = trick
    model = model_of(trick)
    save_model(model, Path("a.safetensors"))
    arguments = "evaluate a.safetensors --recipe trick.py --data tiny.npz --json answer.json".split()
    status, out, err = call(*arguments)
    assert (status, err) == (0, "") and "test 25.00 %, TTA 50.00 % (tiny.npz; the same test images)" in out
    answer = json.loads(Path("answer.json").read_text())
    plain, views = model.logits(dataset.test_images)
    for name, logits in (("plain", plain), ("tta", views)):
        assert answer[name] == measure(logits, dataset.test_labels)
        for number in ("loss", "calibration error"):
            assert f"{answer[name][number]:.4f}" in out
    for true, predicted in itertools.product(range(10), repeat=2):
        expected = ((dataset.test_labels == true) & (views.argmax(-1) == predicted)).sum()
        assert answer["confusion"][true][predicted] == expected
    assert answer["test_images_on_record"] and answer["recipe_hash"] == recipe.hash
    assert answer["data_hash"] == info.hash and answer["recorded"] == {"test_accuracy": 0.25, "tta_accuracy": 0.5}

    status, out, _ = call(*arguments, "--limit-test", "10")
    assert status == 0 and "other test images" in out and "10 images" in out
    assert json.loads(Path("answer.json").read_text())["test_images"] == 10
    status, _, err = call(*arguments, "--limit-test", "21")
    assert status == 2 and "limit_test is 21; tiny.npz has 20 test images" in err


def test_predict_command(trick, call):
    images = trick[1].test_images[:2]
    for i, image in enumerate(images):
        Image.fromarray(image).save(f"{i}.png")
    save_model(model_of(trick), Path("a.safetensors"))
    status, out, err = call("predict", "a.safetensors", "0.png", "1.png", "--recipe", "trick.py", "--json", "a.json")
    assert (status, err) == (0, "")
    answer, expected = json.loads(Path("a.json").read_text()), model_of(trick).predict(images)
    np.testing.assert_array_equal(np.array(answer["probabilities"], np.float32), expected)
    assert answer["images"] == ["0.png", "1.png"] and answer["classes"] == list("0123456789")
    for row in expected:
        assert all(f"{i} {100 * row[i]:.2f} %" in out for i in np.argsort(-row)[:3])


# run --save


def test_save_makes_a_model_with_every_finished_record(workplace, call):
    arguments = ("run", "trick.py", "--data", "tiny.npz", "--dtype", "float32", "--seeds", "2")
    assert call(*arguments)[0] == 0 and not list(Path("runs").rglob("*.safetensors"))
    status, out, _ = call(*arguments, "--save")
    assert status == 0 and "0 skipped" in out  # a record without its model is not enough
    models = sorted(Path("runs").rglob("*.safetensors"))
    assert [path.with_suffix(".json").exists() for path in models] == [True, True]
    assert "2 skipped" in call(*arguments, "--save")[1]
    models[1].unlink()
    assert "1 skipped" in call(*arguments, "--save")[1] and models[1].exists()


def test_diverged_run_leaves_no_model(workplace, call):
    arguments = ("run", "trick.py", "--data", "tiny.npz", "--save", "--set", "optim.peak_lr=1e38")
    assert call(*arguments)[0] == 1 and "1 skipped" in call(*arguments)[1]
    assert len(list(Path("runs").rglob("*.json"))) == 1 and not list(Path("runs").rglob("*.safetensors"))


def test_full_disk_leaves_neither_record_nor_model(workplace, call, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    status, out, err = call("run", "trick.py", "--data", "tiny.npz", "--save")
    assert status == 1 and err.count("\n") == 1 and "No space left" in err and ".safetensors" in err
    assert "0 finished" in out and not [path for path in Path("runs").rglob("*") if path.is_file()]


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


def test_seeds_at_once_are_not_saved(workplace, call):
    status, _, err = call("run", "trick.py", "--data", "tiny.npz", "--save", "--mesh", "1")
    assert status == 2 and "--save cannot be combined with --mesh" in err
