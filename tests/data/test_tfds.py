"""tensorflow-datasets: read, prepared and downloaded without TensorFlow."""

import hashlib
import http.server
import os
import socket
import subprocess
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import requests

from fastcifar_jax.data import load as data_module
from fastcifar_jax.data import readers
from fastcifar_jax.data.load import DataError, load
from tests.helpers_data import (
    FOLDERS,
    TINY,
    binary_files,
    names,
    tar_bytes,
)

TINY_BUILDER = """
import io, sys
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


class TinyImages(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        image = tfds.features.Image(shape=(32, 32, 3))
        label = tfds.features.ClassLabel(names=["cat", "dog"])
        features = tfds.features.FeaturesDict({"image": image, "label": label})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(20), "validation": self._generate_examples(10)}

    def _generate_examples(self, count):
        for i in range(count):
            image = io.BytesIO()
            Image.fromarray(np.full((32, 32, 3), [i, 2 * i, 3 * i], np.uint8)).save(image, "png")
            image.seek(0)
            yield i, {"image": image, "label": i % 2}


from fastcifar_jax.data.load import load

for _ in range(2):
    data, info = load("tiny_images")
    assert (info.classes, info.train, info.test) == (("cat", "dog"), 20, 10)
    value = data.train_images[:, 0, 0, 0].astype(int)
    assert sorted(value) == list(range(20))
    assert (data.train_images == (value[:, None] * [1, 2, 3])[:, None, None]).all()
    assert (data.train_labels == value % 2).all() and data.train_labels.dtype == np.int32
assert "tensorflow" not in sys.modules
"""


def test_tfds_without_tensorflow(tmp_path):
    environment = os.environ | {"TFDS_DATA_DIR": str(tmp_path), "PYTHONPATH": str(Path(readers.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", TINY_BUILDER], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert (tmp_path / "tiny_images" / "1.0.0" / "dataset_info.json").exists()


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_tfds_prepares_cifar_from_its_archive(tmp_path, monkeypatch, name):
    classes = int(name.removeprefix("cifar"))
    expected = TINY[classes]
    archive = tar_bytes(binary_files(expected, classes), FOLDERS["binary", classes])
    calls = []
    monkeypatch.setattr(data_module, "_download", lambda *args: calls.append(args) or archive)
    for _ in range(2):  # the second time from tfds's own folder
        got, found = data_module._read_tfds(name, tmp_path)
    assert len(calls) == 1
    assert found == tuple(names(classes))
    for images, labels, all_images, all_labels in ((*got[:2], *expected[:2]), (*got[2:], *expected[2:])):
        place = {image.tobytes(): i for i, image in enumerate(all_images)}  # tfds keeps them in an order of its own
        order = [place[image.tobytes()] for image in images]
        assert sorted(order) == list(range(len(all_images)))
        np.testing.assert_array_equal(labels, all_labels[order])
    import tensorflow_datasets as tfds

    examples = tfds.builder(name, data_dir=tmp_path).as_data_source("test")
    assert sorted(e["id"] for e in examples) == [f"test_{i:05d}".encode() for i in range(10)]
    if classes == 100:
        assert all(e["coarse_label"] == e["label"] // 5 for e in examples)
    assert "tensorflow" not in sys.modules


def test_tfds_leaves_nothing_of_a_broken_archive(tmp_path, monkeypatch):
    files = binary_files(TINY[10])
    files["data_batch_2.bin"] = files["data_batch_2.bin"][:-1]
    monkeypatch.setattr(data_module, "_download", lambda *args: tar_bytes(files))
    with pytest.raises(DataError, match="data_batch_2.bin has 12291 bytes"):
        data_module._read_tfds("cifar10", tmp_path)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]
    assert not list((tmp_path / "cifar10").iterdir())


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_without_a_network(tmp_path, monkeypatch, name):
    attempts = []

    def refuse(*args, **kwargs):
        attempts.append(args)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(DataError) as caught:
        data_module._read_tfds(name, tmp_path / "tfds")
    assert len(attempts) == 1
    file = name.replace("cifar", "cifar-") + "-binary.tar.gz"
    assert f"https://www.cs.toronto.edu/~kriz/{file}" in str(caught.value)
    assert f"fetch {file} by hand, put it anywhere and give its path with --data" in str(caught.value)
    assert not (tmp_path / "tfds").exists()


def test_a_silent_network_ends_in_an_error(monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(data_module, "CONNECT_SECONDS", 0.05)
    monkeypatch.setattr(requests, "get", lambda *args, **kwargs: release.wait(30))
    with pytest.raises(DataError, match="no answer within 0.05 seconds"):
        data_module._open("http://localhost/", "fetch it by hand")
    release.set()


class Server(http.server.BaseHTTPRequestHandler):
    body, status, claimed, requests = b"", 200, None, 0

    def do_GET(self):
        type(self).requests += 1
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.body) if self.claimed is None else self.claimed))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *args):
        del args


@pytest.mark.parametrize(
    ("reply", "fault"),
    [
        (dict(body=b"the file"), None),
        (dict(body=b"THE FILE"), "are not the known file of 8"),
        (dict(body=b"the file" * 1000), "are not the known file of 8"),
        (dict(body=b"the", claimed=8), "broke off"),
        (dict(status=503), "503"),
        (dict(status=404), "404"),
    ],
)
def test_downloads_are_checked(monkeypatch, reply, fault):
    handler = type("Handler", (Server,), reply)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        expected = types.SimpleNamespace(size=8, checksum=hashlib.sha256(b"the file").hexdigest())
        arguments = (f"http://127.0.0.1:{server.server_port}/file", expected, "fetch it by hand")
        if fault is None:
            assert data_module._download(*arguments) == b"the file"
        else:
            with pytest.raises(DataError, match=fault) as caught:
                data_module._download(*arguments)
            assert "fetch it by hand" in str(caught.value)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert handler.requests == 1


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("cifar01", "no data called 'cifar01'.*nearest names: cifar10"),
        ("digit", "nearest names: digits"),
        ("no/such/thing", "give cifar10, cifar100, digits"),
        ("mnist", "mnist holds .*expected an 'image' of shape"),
        ("cifar10/nothing", "cannot open cifar10/nothing"),
    ],
)
def test_unknown_names(name, fault):
    with pytest.raises(DataError, match=fault):
        load(name)


def test_other_tfds_data_needs_tensorflow_once(tmp_path, monkeypatch):
    monkeypatch.setattr(data_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="needs TensorFlow to prepare imagenet_resized, once"):
        data_module._read_tfds("imagenet_resized/32x32", tmp_path)
    monkeypatch.setattr(data_module.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(data_module, "_open", lambda url, advice: pytest.fail(f"{url} {advice}"))
    with pytest.raises(pytest.fail.Exception, match="Imagenet32_train_npz.zip, .*by hand into .*downloads/manual"):
        data_module._read_tfds("imagenet_resized/32x32", tmp_path)
    assert not list(tmp_path.iterdir())
