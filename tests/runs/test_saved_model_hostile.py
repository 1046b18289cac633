"""Model files from anywhere: whatever the bytes, they load or are refused with one documented error."""

import contextlib
import copy
import json
import os
import pickle
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from safetensors import numpy as safetensors

from fastcifar_jax.data.load import DataInfo
from fastcifar_jax.evaluate import SixViewTTA
from fastcifar_jax.models.activations import Celu
from fastcifar_jax.models.layers import BatchNormConfig
from fastcifar_jax.models.resnet9 import ResNet9
from fastcifar_jax.recipe import Recipe
from fastcifar_jax.runs import saved_model
from fastcifar_jax.runs.saved_model import FACTS, SavedModelError, load_model
from tests.helpers_cli import train_and_test
from tests.helpers_fuzz import COUNTS, EXTREMES, fuzz, mutants

NARROW = ResNet9(channels=(1, 1, 1, 1), activation=Celu(), norm=BatchNormConfig(num_groups=2), res_layers=())
RECIPE = Recipe(model=NARROW, tta=SixViewTTA(), compute_dtype="float32")


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    """The bytes of an untrained model, which load."""
    variables = jax.eval_shape(NARROW(10, "float32").init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    variables = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), variables)
    info = DataInfo("digits", "f00d", tuple("abcdefghij"), 130, 20)
    path = tmp_path_factory.mktemp("models") / "valid.safetensors"
    saved_model.save_model(saved_model.of_run(RECIPE, info, train_and_test(), 0, variables, (0.5, 0.5)), path)
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


def test_truncated(tmp_path, valid):
    for kept in (0.999, 0.9, 0.1):
        refusal(tmp_path, valid[: int(kept * len(valid))])


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
    *parents, last = name.split(".")
    part = description
    for parent in parents:
        part = part[parent]
    part[last] = value
    assert message in refusal(tmp_path, packed(header, description, body))


def test_incomplete_description(tmp_path, valid):
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


# Fuzzing: whatever the bytes, the only error is SavedModelError.

JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9), st.sampled_from(EXTREMES)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["type", "shape", "alpha"]), inner),
    max_leaves=6,
)


def changed(value, draw):
    """`value` with one of its values, or of those inside them, replaced."""
    value = part = copy.deepcopy(value)
    while True:
        key = draw(st.sampled_from(sorted(part) if isinstance(part, dict) else range(len(part))))
        if not part[key] or not isinstance(part[key], dict | list) or draw(st.booleans()):
            part[key] = draw(JSON)
            return value
        part = part[key]


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


def test_a_bad_image_is_one_line_of_the_command(tmp_path, call, valid):
    (tmp_path / "a.safetensors").write_bytes(valid)
    for model, message in (("a", "missing.png"), ("b", "b.safetensors: there is no such file")):
        status, _, err = call("predict", str(tmp_path / f"{model}.safetensors"), str(tmp_path / "missing.png"))
        assert status == 2 and message in err and err.count("\n") == 1
