"""Saved models: what is loaded predicts what was trained, and a file of any bytes loads or is refused."""

import contextlib
import json
import os
import pickle
import tracemalloc
from dataclasses import replace
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from safetensors import numpy as safetensors

from fastcifar_jax.averaging import Ema
from fastcifar_jax.cli import app as cli
from fastcifar_jax.data import load as data
from fastcifar_jax.evaluate import SixViewTTA
from fastcifar_jax.functions import eval_variables
from fastcifar_jax.losses import CrossEntropy
from fastcifar_jax.models.activations import Celu
from fastcifar_jax.models.layers import BatchNormConfig
from fastcifar_jax.models.resnet9 import ResNet9
from fastcifar_jax.recipe import Recipe
from fastcifar_jax.runs import records
from fastcifar_jax.runs.saved_model import FACTS, SavedModelError, load_model, of_run, save_model
from fastcifar_jax.train import make_train
from tests.helpers_cli import train_and_test
from tests.helpers_data import write_npz
from tests.helpers_fuzz import COUNTS, changed, fuzz, mutants, set_value
from tests.helpers_train import DATASET, NUM_TRAIN, linear, quadrants

RESNET9 = """
from dataclasses import replace
from experiments.bag_of_tricks import final

norm = replace(final.model.norm, num_groups=2)
optim = replace(final.optim, peak_lr=0.1, schedule=replace(final.optim.schedule, flat_epochs=0.5))
model = replace(final.model, norm=norm, res_layers=("layer3",)).with_width(2)
RECIPE = replace(final, num_epochs=2, batch_size=64, model=model, optim=optim, compute_dtype="mixed")
"""


@pytest.mark.slow
def test_a_real_run(tmp_path):
    """`run --save`: the model gives what is on record, and is the same file when saved again."""
    (tmp_path / "resnet9.py").write_text(RESNET9)
    source = str(write_npz(tmp_path / "tiny.npz", train_and_test(130, 520)))  # to test: one chunk and a part of one
    arguments = ["run", str(tmp_path / "resnet9.py"), "--save", "--data", source, "--out", str(tmp_path / "runs")]
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 0
    [(path, record)] = records.find(tmp_path / "runs").items()
    path = path.with_suffix(".safetensors")
    model, (dataset, info) = load_model(path), data.load_data(source)
    labels, logits = dataset.test_labels, model.logits(dataset.test_images)
    for name, found in zip(("test", "tta"), logits, strict=True):
        assert (found.argmax(-1) == labels).sum() / len(labels) == record.result[f"{name}_accuracy"]
        assert getattr(model, f"{name}_accuracy") == record.result[f"{name}_accuracy"]
        loss = CrossEntropy(0.2)(jnp.asarray(found), jnp.asarray(labels)).mean()
        np.testing.assert_allclose(loss, getattr(record.epochs[-1], f"{name}_loss"), rtol=1e-6)
    assert (logits[0] != logits[1]).any()

    assert (model.recipe.name, model.recipe.hash, model.seed) == (record.experiment, record.recipe_hash, 0)
    assert repr(model.recipe) == record.recipe_repr and model.classes == info.classes
    assert (model.data_source, model.data_hash) == (source, record.provenance.data["hash"])
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(model.variables))
    # A chunk of another size may round differently, here to bfloat16.
    np.testing.assert_allclose(model.predict(dataset.test_images[:2]), jax.nn.softmax(logits[1][:2]), atol=1e-2)
    save_model(model, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


LINEAR = replace(linear(), tta=SixViewTTA(), average=Ema(0.9, 1))
INFO = data.DataInfo("tiny.npz", "f00d", tuple("abcd"), NUM_TRAIN, 20)


@pytest.fixture(scope="module")
def state():
    """The end of a run of a linear network with six views, whose weights are averaged."""
    return make_train(LINEAR, 4)(jax.random.key(0), DATASET).state


def model_of(state, **changes):
    return replace(of_run(LINEAR, INFO, DATASET, 3, eval_variables(state), (0.25, 0.5)), **changes)


def test_round_trip_is_bitwise_and_of_the_averaged_weights(state, tmp_path):
    path, images, average = tmp_path / "deep/a.safetensors", np.asarray(DATASET.test_images), state.average["params"]
    save_model(model_of(state), path)
    model = load_model(path, LINEAR)
    chex.assert_trees_all_equal(model.variables, eval_variables(state))
    chex.assert_trees_all_equal(model.variables["params"], average)
    assert (model.variables["params"]["w"] != state.params["w"]).any()
    assert (model.seed, model.test_accuracy, model.tta_accuracy) == (3, 0.25, 0.5)
    assert model.recipe == LINEAR
    mean, std = (np.array(x, np.float32) for x in (LINEAR.mean, LINEAR.std))
    w, bias = np.asarray(average["w"]), np.asarray(average["whiten"]["bias"])
    expected = quadrants((images - mean) / std) @ w + bias
    np.testing.assert_allclose(model.logits(images)[0], expected, atol=1e-5)


@pytest.mark.parametrize("num_images", [0, 1, 3, 501])
def test_predicts_any_number_of_images(state, num_images):
    images = np.random.default_rng(1).integers(0, 256, (num_images, 16, 16, 3), np.uint8)
    model = model_of(state)
    found = model.predict(jnp.asarray(images))
    assert found.dtype == np.float32 and found.shape == (num_images, 4)
    if num_images:
        np.testing.assert_allclose(found, jax.nn.softmax(model.logits(images)[1]), rtol=1e-5)


def test_own_network_comes_from_the_caller(state, tmp_path):
    save_model(model_of(state), tmp_path / "a.safetensors")
    with pytest.raises(SavedModelError, match=r"a\.safetensors: recipe\.model: .*'Linear', .*recipe=my_recipe"):
        load_model(tmp_path / "a.safetensors")
    other = replace(LINEAR, model=replace(LINEAR.model, coin=True))  # the class is the caller's, its values the file's
    assert load_model(tmp_path / "a.safetensors", other).recipe == LINEAR


def test_other_images_are_refused(state):
    model = model_of(state)
    uint8 = lambda *shape: np.zeros(shape, np.uint8)
    for images in (np.zeros((2, 16, 16, 3)), uint8(16, 16, 3), uint8(2, 3, 16, 16), [[0]]):
        for method in (model.predict, model.logits):
            with pytest.raises(ValueError, match=r"expected uint8 \(n, 16, 16, 3\)"):
                method(images)
    with pytest.raises(ValueError, match="give at least one"):
        model.logits(uint8(0, 16, 16, 3))


def test_logits_must_be_finite(state):
    variables = jax.tree.map(lambda x: jnp.full_like(x, 3e38), eval_variables(state))
    model = model_of(state, variables=variables)
    for method in (model.predict, model.logits):
        with pytest.raises(SavedModelError, match="not finite"):
            method(np.full((1, 16, 16, 3), 255, np.uint8))


# Model files from anywhere: whatever the bytes, they load or are refused with one documented error.

NARROW = ResNet9(channels=(1, 1, 1, 1), activation=Celu(), norm=BatchNormConfig(num_groups=2), res_layers=())
RECIPE = Recipe(model=NARROW, tta=SixViewTTA(), compute_dtype="float32")


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    """The bytes of an untrained model, which load."""
    variables = jax.eval_shape(NARROW(10, "float32").init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    variables = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), variables)
    info = data.DataInfo("digits", "f00d", tuple("abcdefghij"), 130, 20)
    path = tmp_path_factory.mktemp("models") / "valid.safetensors"
    save_model(of_run(RECIPE, info, train_and_test(), 0, variables, (0.5, 0.5)), path)
    assert load_model(path).recipe == RECIPE
    return path.read_bytes()


def unpacked(content):
    """`(header, description of the model, bytes of the arrays)`."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    return header, json.loads(header["__metadata__"]["fastcifar_jax"]), content[end:]


def packed(header, description, body):
    text = description if isinstance(description, str) else json.dumps(description)
    text = json.dumps({**header, "__metadata__": {"fastcifar_jax": text}}).encode()
    return len(text).to_bytes(8, "little") + text + body


def refusal(folder, content):
    path = folder / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(SavedModelError) as caught:
        load_model(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and message.isprintable() and len(message) < 1500
    return message


@pytest.mark.parametrize(
    ("length", "text", "message"),
    [
        (0, b"", "8 bytes"),
        (int.from_bytes(pickle.dumps(Path("a"))[:8], "little"), bytes(100), "header claims"),
        (1 << 42, b"{}", "header claims 4398046511104 bytes of 10"),
        (2, b"{}", "another program wrote it"),
        (20, b'{"__metadata__": {}}', "another program wrote it"),
        (2, b"[]", "SafetensorError"),
        (9, b'{"a":\x1b[3}', "SafetensorError"),
        (4000, b"[" * 4000, "SafetensorError"),
    ],
)
def test_not_a_model(tmp_path, length, text, message):
    assert message in refusal(tmp_path, length.to_bytes(8, "little") + text)


def test_no_file(tmp_path):
    os.mkfifo(tmp_path / "fifo")  # reading it would wait forever
    for path in (tmp_path, tmp_path / "missing", tmp_path / "fifo", "a\0b"):
        with pytest.raises(SavedModelError, match="there is no such file|null"):
            load_model(path)


def test_terabytes_are_refused_before_they_are_read(tmp_path, valid):
    header, description, body = unpacked(valid)
    path = tmp_path / "sparse.safetensors"
    path.write_bytes(valid)
    os.truncate(path, 1 << 41)  # takes no room on the disk
    claims = {**header, "params/linear": {"dtype": "F32", "shape": [1 << 20, 1 << 20], "data_offsets": [0, 1 << 42]}}
    tracemalloc.start()
    try:
        with pytest.raises(SavedModelError, match="2199023255552 bytes"):
            load_model(path)
        assert "SafetensorError" in refusal(tmp_path, packed(claims, description, body))
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


# Values of every kind are in tests/test_recipe.py.
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("format", 1, "its description is {'format': 1, "),
        ("seed", -1, "seed is -1; expected a whole number from 0"),
        ("seed", True, "seed is True"),
        ("data_source", "\x1b]0;owned\x07", "data_source: got '\\x1b]0;owned\\x07'; give "),
        ("classes", [], "it has 0 classes"),
        ("classes", "abcdefghij", "classes: expected tuple"),
        ("classes", ["a"] * 9, "'params/linear' is float32 (1, 10); expected float32 (1, 9)"),
        ("image_shape", [1, 1, 3], "does not fit into maps of"),
        ("image_shape", [1 << 20, 1 << 20, 3], "expected sides of at most"),
        ("image_shape", [32, 32, 4], "its images are (32, 32, 4)"),
        ("more", 1, "it describes format, recipe, seed"),
        ("recipe", None, "recipe: expected a dict whose type is one of Recipe, got None"),
        ("recipe.mean", [1.0, 2.0, 1e200], "recipe.mean.2: got 1e+200; give finite numbers"),
        ("recipe.compute_dtype", "auto", "dtype 'auto'"),
        ("recipe.compute_dtype", "float64", "float64"),
        ("recipe.model", {"type": "os.system"}, "for a class of your own, give its recipe"),
        ("recipe.model.channels", [1, 1, 1, 2], "expected float32"),
        ("recipe.model.channels", [2**31 - 1] * 4, ""),
        ("recipe.model.norm.num_groups", 2**31 - 1, "expected float32"),
        ("recipe.model.activation", {"type": "Celu", "alpha": 0.0}, "alpha 0.0"),
        ("recipe.tta.shift", 2**30, "SixViewTTA shifts by 1073741824 pixels"),
    ],
)  # fmt: skip
def test_damaged_description(tmp_path, valid, name, value, message):
    header, description, body = unpacked(valid)
    set_value(description, name, value)
    assert message in refusal(tmp_path, packed(header, description, body))


def test_incomplete_file(tmp_path, valid):
    for kept in (0.999, 0.9, 0.1):
        refusal(tmp_path, valid[: int(kept * len(valid))])
    header, description, body = unpacked(valid)
    for text in ("", "null", "1", '"a"', "[" * 100_000, "{", '{"format": 2}', "1" * 5000):
        refusal(tmp_path, packed(header, text, body))
    for name in ("recipe", "seed", *FACTS):
        rest = {key: value for key, value in description.items() if key != name}
        assert "expected recipe, seed, version" in refusal(tmp_path, packed(header, rest, body))


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("params/linear", None, "tensors that differ from the network's: 'params/linear'"),
        ("more", np.zeros(3, np.float32), "tensors that differ from the network's: 'more'"),
        ("params/linear", np.ones((10, 1), np.float32), "is float32 (10, 1); expected float32 (1, 10)"),
        ("params/linear", np.ones((1, 10), np.float16), "is float16 (1, 10); expected float32"),
        ("params/linear", np.full((1, 10), -np.inf, np.float32), "'params/linear' has values that are not finite"),
    ],
)
def test_other_tensors(tmp_path, valid, name, array, message):
    tensors = {**safetensors.load(valid), name: array}
    tensors = {name: array for name, array in tensors.items() if array is not None}
    assert message in refusal(tmp_path, safetensors.save(tensors, unpacked(valid)[0]["__metadata__"]))


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("damage", ["bytes", "header", "description"])
def test_fuzz(tmp_path, valid, damage, count):
    header, description, body = unpacked(valid)
    path = tmp_path / "fuzzed.safetensors"

    def test(data):
        if damage == "bytes":
            path.write_bytes(data.draw(mutants(valid)))
        elif damage == "header":
            path.write_bytes(packed(changed(header, data.draw), description, body))
        else:
            path.write_bytes(packed(header, changed(description, data.draw), body))
        with contextlib.suppress(SavedModelError):
            load_model(path)

    fuzz(count, st.data(), test)
