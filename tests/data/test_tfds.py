"""tensorflow-datasets: read, prepared and downloaded without TensorFlow."""

import hashlib
import http.server
import io
import logging
import socket
import sys
import threading

import numpy as np
import pytest
import requests
from PIL import Image

from fastcifar_jax.data import download, tfds
from fastcifar_jax.data.load import DataError, load_data
from tests.helpers_data import FOLDERS, TINY, binary_files, names, tar_bytes


@pytest.fixture(autouse=True)
def no_tensorflow():
    yield
    assert "tensorflow" not in sys.modules


def define_tiny_images():
    import tensorflow_datasets

    class TinyImages(tensorflow_datasets.core.GeneratorBasedBuilder):
        VERSION = tensorflow_datasets.core.Version("1.0.0")

        def _info(self):
            image = tensorflow_datasets.features.Image(shape=(32, 32, 3))
            label = tensorflow_datasets.features.ClassLabel(names=["cat", "dog"])
            features = tensorflow_datasets.features.FeaturesDict({"image": image, "label": label})
            return tensorflow_datasets.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(20), "validation": self._generate_examples(10)}

        def _generate_examples(self, count):
            print("on stdout")
            for i in range(count):
                image = io.BytesIO()
                Image.fromarray(np.full((32, 32, 3), [i, 2 * i, 3 * i], np.uint8)).save(image, "png")
                image.seek(0)
                yield i, {"image": image, "label": i % 2}


def test_any_labelled_images(tmp_path, monkeypatch, capsys):
    define_tiny_images()
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path))
    for _ in range(2):
        data, info = load_data("tiny_images")
        assert (info.classes, info.train, info.test) == (("cat", "dog"), 20, 10)
        value = data.train_images[:, 0, 0, 0].astype(int)
        assert sorted(value) == list(range(20))
        assert (data.train_images == (value[:, None] * [1, 2, 3])[:, None, None]).all()
        assert (data.train_labels == value % 2).all() and data.train_labels.dtype == np.int32
    out, err = capsys.readouterr()
    assert out == "" and err.count("on stdout") == 2  # once per split, the first time
    assert (tmp_path / "tiny_images" / "1.0.0" / "dataset_info.json").exists()


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_is_prepared_from_its_archive(tmp_path, monkeypatch, classes):
    name, expected, calls = f"cifar{classes}", TINY[classes], []
    archive = tar_bytes(binary_files(expected, classes), FOLDERS["binary", classes])
    monkeypatch.setattr(tfds, "download", lambda *args: calls.append(args) or archive)
    for _ in range(2):  # the second time from tfds's own folder
        got, found = tfds.read_tfds(name, tmp_path)
    assert len(calls) == 1
    assert found == tuple(names(classes))
    for images, labels, all_images, all_labels in ((*got[:2], *expected[:2]), (*got[2:], *expected[2:])):
        place = {image.tobytes(): i for i, image in enumerate(all_images)}  # tfds keeps them in an order of its own
        order = [place[image.tobytes()] for image in images]
        assert sorted(order) == list(range(len(all_images)))
        np.testing.assert_array_equal(labels, all_labels[order])
    import tensorflow_datasets

    examples = tensorflow_datasets.builder(name, data_dir=tmp_path).as_data_source("test")
    assert sorted(e["id"] for e in examples) == [f"test_{i:05d}".encode() for i in range(10)]
    if classes == 100:
        assert all(e["coarse_label"] == e["label"] // 5 for e in examples)


def test_nothing_is_left_of_a_broken_archive(tmp_path, monkeypatch):
    files = binary_files(TINY[10])
    files["data_batch_2.bin"] = files["data_batch_2.bin"][:-1]
    monkeypatch.setattr(tfds, "download", lambda *args: tar_bytes(files))
    with pytest.raises(DataError, match="data_batch_2.bin has 12,291 bytes"):
        tfds.read_tfds("cifar10", tmp_path)
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
        tfds.read_tfds(name, tmp_path / "tfds")
    assert len(attempts) == 1
    file = name.replace("cifar", "cifar-") + "-binary.tar.gz"
    assert f"https://www.cs.toronto.edu/~kriz/{file}" in str(caught.value)
    assert f"fetch {file} by hand, put it anywhere and give its path with --data" in str(caught.value)
    assert not (tmp_path / "tfds").exists()


def test_a_silent_network_ends_in_an_error(monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(download, "CONNECT_SECONDS", 0.05)
    monkeypatch.setattr(requests, "get", lambda *args, **kwargs: release.wait(30))
    with pytest.raises(DataError, match="no answer within 0.05 seconds"):
        download.open_url("http://localhost/", "fetch it by hand")
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
        (dict(body=b"THE FILE"), "expected the known file of 8"),
        (dict(body=b"the file" * 1000), "expected the known file of 8"),
        (dict(body=b"the", claimed=8), "broke off"),
        (dict(status=503), "503"),
        (dict(status=404), "404"),
    ],
)
def test_downloads_are_checked(monkeypatch, caplog, capsys, reply, fault):
    handler = type("Handler", (Server,), reply)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}/file"
    arguments = (url, 8, hashlib.sha256(b"the file").hexdigest(), "fetch it by hand")
    try:
        if fault is None:
            with caplog.at_level(logging.INFO, "fastcifar_jax.data"):
                assert download.download(*arguments) == b"the file"
            assert caplog.messages == [f"downloading {url} (0.0 MB)"] and capsys.readouterr() == ("", "")
        else:
            with pytest.raises(DataError, match=f"{fault}.*fetch it by hand"):
                download.download(*arguments)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert handler.requests == 1


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("cifar01", "no data set called 'cifar01'.*nearest names: cifar10"),
        ("digit", "nearest names: digits"),
        ("a" * 300, "and no such file"),
        ("no/such/thing", "give cifar10, cifar100, digits"),
        ("mnist", "mnist holds .*expected .* 'image'"),
        ("cifar10/nothing", "cannot open cifar10/nothing"),
    ],
)
def test_unknown_names(name, fault):
    with pytest.raises(DataError, match=fault):
        load_data(name)


def test_other_data_need_tensorflow_once(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="needs TensorFlow to prepare imagenet_resized, once"):
        tfds.read_tfds("imagenet_resized/32x32", tmp_path)
    monkeypatch.setattr(tfds.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(tfds, "open_url", lambda url, advice: pytest.fail(f"{url} {advice}"))
    with pytest.raises(pytest.fail.Exception, match="Imagenet32_train_npz.zip, .*by hand into .*downloads/manual"):
        tfds.read_tfds("imagenet_resized/32x32", tmp_path)
    assert not list(tmp_path.iterdir())
