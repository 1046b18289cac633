"""Model files made to harm: refused with one documented error, whatever the bytes."""

import contextlib
import copy
import dataclasses
import io
import json
import os
import pickle
import tracemalloc
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastcifar_jax.data.load import DataInfo
from fastcifar_jax.evaluate import SixViewTTA
from fastcifar_jax.models.activations import Celu
from fastcifar_jax.models.base import Model
from fastcifar_jax.models.layers import BatchNormConfig
from fastcifar_jax.models.resnet9 import ResNet9
from fastcifar_jax.recipe import Recipe
from fastcifar_jax.runs import saved_model as saved
from fastcifar_jax.runs.saved_model import SavedModelError, load
from tests.helpers_cli import train_and_test


@dataclasses.dataclass(frozen=True)
class Linear:
    """A network that is traced in no time."""

    def with_width(self, width):
        return self

    def __call__(self, num_classes, compute_dtype):
        def init(key, images):
            shapes = {"w": (3, num_classes), "b": (num_classes,)}
            return {"params": {k: jnp.zeros(v) for k, v in shapes.items()}, "constants": {}, "batch_stats": {}}

        def apply(variables, images, train):
            params = variables["params"]
            return images.mean((1, 2)) @ params["w"] + params["b"][None], {}

        return Model(init, apply, lambda stats: stats, lambda variables, images: {})


LINEAR = Recipe(model=Linear(), compute_dtype="float32")
NARROW = ResNet9(channels=(1, 1, 1, 1), activation=Celu(), norm=BatchNormConfig(num_groups=2), res_layers=())
RESNET9 = Recipe(model=NARROW, tta=SixViewTTA(), compute_dtype="float32")


def content_of(recipe, folder):
    """The bytes of an untrained model."""
    model = recipe.model(10, "float32")
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    variables = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), variables)
    info = DataInfo("digits", "f00d", tuple("abcdefghij"), 130, 20)
    path = folder / "valid.safetensors"
    saved.write(saved.of_run(recipe, info, train_and_test(), 0, variables, (0.5, 0.5)), path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def resnet9(tmp_path_factory):
    return content_of(RESNET9, tmp_path_factory.mktemp("resnet9"))


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    return content_of(LINEAR, tmp_path_factory.mktemp("linear"))


def unpacked(content):
    """`(header, about the model, bytes of the arrays)`."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    return header, json.loads(header["__metadata__"]["fastcifar_jax"]), content[end:]


def packed(header, about, body):
    metadata = {} if about is None else {"fastcifar_jax": about if isinstance(about, str) else json.dumps(about)}
    text = json.dumps({**header, "__metadata__": metadata}).encode()
    return len(text).to_bytes(8, "little") + text + body


def refusal(folder, content, recipe=None):
    path = folder / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(SavedModelError) as caught:
        load(path, recipe=recipe)
    message = str(caught.value)
    assert str(path) in message and message.isprintable() and len(message) < 1500
    return message


def test_the_valid_files_are_valid(tmp_path, resnet9, linear):
    """So that the tests below fail for the faults that they name."""
    for content, recipe in ((resnet9, None), (linear, LINEAR), (packed(*unpacked(resnet9)), None)):
        (tmp_path / "a.safetensors").write_bytes(content)
        assert load(tmp_path / "a.safetensors", recipe=recipe).classes == tuple("abcdefghij")


class Calls:
    def __reduce__(self):
        return os.system, ("true",)


def zip_bytes():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a", "a")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes"),
        (b"12345678", "8 bytes"),
        (b"once upon a time there was a model", "header claims"),
        (pickle.dumps(Calls()) + bytes(100), "header claims"),
        (zip_bytes(), "header claims"),
        ((1 << 42).to_bytes(8, "little") + b"{}", "header claims 4398046511104 bytes of 10"),
        ((2).to_bytes(8, "little") + b"{}", "another program has written it"),
        ((2).to_bytes(8, "little") + b"[]", "is no saved model"),
        ((9).to_bytes(8, "little") + b'{"a":\x1b[3}', "is no saved model"),
        ((4000).to_bytes(8, "little") + b"[" * 4000, "is no saved model"),
    ],
)
def test_no_model(tmp_path, content, message):
    assert message in refusal(tmp_path, content)


def test_no_file(tmp_path):
    os.mkfifo(tmp_path / "fifo")  # reading it would wait for ever
    for path in (tmp_path, tmp_path / "missing", tmp_path / "fifo"):
        with pytest.raises(SavedModelError, match="there is no such file"):
            load(path)
    with pytest.raises(SavedModelError):
        load("a\0b")


def test_terabytes_are_refused_before_they_are_read(tmp_path, resnet9):
    header, about, body = unpacked(resnet9)
    path = tmp_path / "a.safetensors"
    path.write_bytes(resnet9)
    os.truncate(path, 1 << 41)  # sparse: it takes no room on the disk
    name = next(iter(header.keys() - {"__metadata__"}))
    claims = {**header, name: {"dtype": "F32", "shape": [1 << 20, 1 << 20], "data_offsets": [0, 1 << 42]}}
    tracemalloc.start()
    try:
        with pytest.raises(SavedModelError, match="2199023255552 bytes"):
            load(path)
        assert "is no saved model" in refusal(tmp_path, packed(claims, about, body))
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("left", [0.999, 0.9, 0.1])
def test_truncated(tmp_path, resnet9, left):
    refusal(tmp_path, resnet9[: int(left * len(resnet9))])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("format", 2, "it is of format 2, by fastcifar_jax '0.1.0'; this version reads 1"),
        ("format", None, "it is of format None"),
        ("seed", -1, "seed is -1; expected int"),
        ("seed", True, "seed is True; expected int"),
        ("test_accuracy", float("nan"), "test_accuracy is nan"),
        ("experiment", "\x1b]0;owned\x07", "experiment is '\\x1b]0;owned\\x07'"),
        ("recipe_hash", {"repr": "x"}, "recipe_hash is"),
        ("classes", [], "it has 0 classes"),
        ("classes", "abcdefghij", "classes is"),
        ("classes", ["a"] * 9, "params/linear"),
        ("classes", ["a"] * 9 + ["\u202e"], "classes is '\\u202e'"),
        ("image_shape", [32, 32], "image_shape is"),
        ("image_shape", [1, 1, 3], "does not fit into maps of"),
        ("image_shape", [1 << 20, 1 << 20, 3], "expected sides of at most"),
        ("image_shape", [32, 32, 4], "expected"),
        ("mean", [1.0, 2.0, "3"], "mean is '3'; expected float"),
        ("std", [1.0, 2.0, 0.0], "std above 0"),
        ("std", [1.0, 2.0, float("inf")], "std is inf"),
        ("mean", [1.0, 2.0, 1e200], "mean is 1e+200"),
        ("compute_dtype", "auto", "dtype 'auto'"),
        ("compute_dtype", "float64", "is no saved model"),
        ("network", "ResNet9", "network is 'ResNet9'; expected one of ResNet9, AirNet"),
        ("network", {"class": "os.system"}, "expected one of ResNet9, AirNet"),
        ("network", {"class": ["ResNet9"]}, "expected one of ResNet9, AirNet"),
        ("network", {"class": "FlipTTA"}, "expected one of ResNet9, AirNet"),
        ("network", {"repr": "Mine()"}, "give the recipe that has it"),
        ("network", {"repr": ["Mine()"]}, "network is ['Mine()']; expected str"),
        ("network.channels", [1, 1, 1], "network.channels is [1, 1, 1]"),
        ("network.channels", [1, 1, 1, 2], "expected float32"),
        ("network.channels", [0, 1, 1, 1], "give four numbers >= 1"),
        ("network.channels", [2**31, 2**31, 2**31, 2**31], ""),
        ("network.norm.num_groups", 2**31, "expected float32"),
        ("network.channels", [1, 1, 1, 10**4000], "network.channels is"),
        ("network.whiten", True, "it lacks the tensors constants/whiten/kernel"),
        ("network.whiten", 1, "network.whiten is 1; expected bool"),
        ("network.pool_order", "norm", "network.pool_order is 'norm'"),
        ("network.res_layers", ["layer9"], "res_layers and extra_layers name"),
        ("network.res_layers", ["layer1"], "it lacks the tensors batch_stats/layer1/res1"),
        ("network.activation", {"class": "Celu", "alpha": 0.0}, "alpha 0.0"),
        ("network.activation", {"class": "Celu", "alpha": 1.0, "more": 1}, "expected alpha"),
        ("network.activation", {"class": "NoTTA"}, "expected one of Relu, Celu, Gelu"),
        ("network.norm", None, "network.norm is None; expected one of BatchNormConfig"),
        ("network.norm.eps", float("-inf"), "network.norm.eps is -inf"),
        ("tta.shift", 0, "shift 0"),
        ("tta.shift", 2**30, "SixViewTTA shifts by 1073741824 pixels"),
        ("__class__", 1, "its metadata are"),
    ],
)
def test_damaged_description(tmp_path, resnet9, name, value, message):
    header, about, body = unpacked(resnet9)
    *parents, last = name.split(".")
    part = about
    for parent in parents:
        part = part[parent]
    part[last] = value
    assert message in refusal(tmp_path, packed(header, about, body))


def test_lacking_description(tmp_path, resnet9):
    header, about, body = unpacked(resnet9)
    assert "another program has written it" in refusal(tmp_path, packed(header, None, body))
    for text in ("", "null", "1", '"a"', "[" * 100_000, "{", '{"format": 1}', "1" * 5000):
        refusal(tmp_path, packed(header, text, body))
    for name in about:
        less = {key: value for key, value in about.items() if key != name}
        assert name in refusal(tmp_path, packed(header, less, body))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("params/linear"), "it lacks the tensors params/linear"),
        (lambda tensors: tensors.update(more=np.zeros(3, np.float32)), "it holds the unknown tensors 'more'"),
        (lambda tensors: tensors.update({"params/linear": np.ones((10, 1), np.float32)}), "(10, 1); expected float32"),
        (lambda tensors: tensors.update({"params/linear": np.ones((1, 10), np.float16)}), "is float16 (1, 10)"),
        (lambda tensors: tensors.update({"params/linear": np.ones((1, 10), np.int32)}), "is int32 (1, 10)"),
        (lambda tensors: tensors["params/linear"].fill(np.nan), "'params/linear' holds numbers that are not finite"),
        (lambda tensors: tensors["params/linear"].fill(-np.inf), "'params/linear' holds numbers that are not finite"),
    ],
)
def test_other_tensors(tmp_path, resnet9, change, message):
    from safetensors import numpy as library

    tensors = {name: array.copy() for name, array in library.load(resnet9).items()}
    change(tensors)
    assert message in refusal(tmp_path, library.save(tensors, unpacked(resnet9)[0]["__metadata__"]))


# Fuzzing: whatever the bytes, the only error is SavedModelError, and what is loaded predicts or says why not.

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=9)
    | st.sampled_from(["BatchNormConfig", "ResNet9"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["class", "repr", "alpha"]), inner),
    max_leaves=6,
)
fuzzed = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def try_to_load(folder, content, recipe=None):
    path = folder / "fuzzed.safetensors"
    path.write_bytes(content)
    with contextlib.suppress(SavedModelError):
        return load(path, recipe=recipe)


def mutated(draw, content):
    """Some bytes flipped, and a piece cut out, repeated or overwritten; the header more often than the arrays."""
    content = bytearray(content)
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(draw(st.integers(0, 3))):
        content[draw(st.one_of(st.integers(0, header), st.integers(0, len(content) - 1)))] ^= draw(st.integers(1, 255))
    start = draw(st.one_of(st.integers(0, 8), st.integers(0, header), st.integers(0, len(content))))
    length = draw(st.one_of(st.integers(0, 8), st.integers(0, len(content))))
    return content[:start] + draw(st.binary(max_size=8)) * draw(st.integers(0, 3)) + content[start + length :]


@fuzzed
@given(draw=st.data())
def test_bytes(tmp_path, linear, draw):
    try_to_load(tmp_path, mutated(draw.draw, linear), LINEAR)


@fuzzed
@given(draw=st.data())
def test_random_files(tmp_path, draw):
    text = draw.draw(st.one_of(st.binary(max_size=200), JSON.map(lambda value: json.dumps(value).encode())))
    length = draw.draw(st.one_of(st.just(len(text)), st.integers(0, 300), st.integers(0, 2**64 - 1)))
    try_to_load(tmp_path, length.to_bytes(8, "little") + text + draw.draw(st.binary(max_size=40)), LINEAR)


@fuzzed
@given(draw=st.data())
def test_headers(tmp_path, linear, draw):
    """A header whose JSON is whole: entries replaced, taken out or added."""
    header, about, body = unpacked(linear)
    for name in draw.draw(st.lists(st.sampled_from([*sorted(header), "more"]), max_size=2)):
        offsets = st.lists(st.integers(0, 2**66) | st.sampled_from([0, 40, 160, len(body)]), min_size=2, max_size=2)
        shape = st.lists(st.integers(0, 2**66) | st.sampled_from([1, 3, 10]), max_size=3)
        dtype = st.sampled_from(["F32", "F16", "BF16", "I64", "F8_E4M3", "F4", "BOOL", "F99"])
        entry = st.fixed_dictionaries({"dtype": dtype, "shape": shape, "data_offsets": offsets})
        header[name] = draw.draw(st.one_of(JSON, entry))
    try_to_load(tmp_path, packed(header, about, body), LINEAR)


@settings(fuzzed, max_examples=30)
@given(draw=st.data())
def test_descriptions(tmp_path, resnet9, draw):
    """Values replaced anywhere in what is said of the model."""
    header, about, body = unpacked(resnet9)
    about = copy.deepcopy(about)
    for _ in range(draw.draw(st.integers(1, 2))):
        part = about
        while True:
            key = draw.draw(st.sampled_from(sorted(part) if isinstance(part, dict) else range(len(part))))
            if not (isinstance(part[key], dict | list) and part[key] and draw.draw(st.booleans())):
                break
            part = part[key]
        part[key] = draw.draw(JSON)
    try_to_load(tmp_path, packed(header, about, body))


def test_a_bad_image_is_one_line_of_the_command(tmp_path, call, resnet9):
    (tmp_path / "a.safetensors").write_bytes(resnet9)
    status, _, err = call("predict", str(tmp_path / "a.safetensors"), str(tmp_path / "missing.png"))
    assert status == 2 and "missing.png" in err and err.count("\n") == 1
    status, _, err = call("predict", str(tmp_path / "b.safetensors"), str(tmp_path / "missing.png"))
    assert status == 2 and "b.safetensors: there is no such file" in err and err.count("\n") == 1
