"""What holds for every source: names, paths, limits and hashes."""

import hashlib

import numpy as np
import pytest
from sklearn.datasets import load_digits

from fastcifar_jax.data import load as module
from fastcifar_jax.data.load import DataError, load_data
from tests.helpers_data import TINY, assert_same, python_files, refusal, write_folder, write_npz


@pytest.fixture
def npz(tmp_path):
    return str(write_npz(tmp_path / "a.npz", TINY[10]))


def test_digits():
    got, info = load_data("digits")
    assert (info.source, info.classes, info.train, info.test) == ("digits", tuple("0123456789"), 1437, 360)
    assert got.train_images.shape == (1437, 32, 32, 3) and got.train_images.dtype == np.uint8
    assert got.test_labels.shape == (360,) and got.train_labels.dtype == np.int32
    assert got.train_images.min() == 0 and got.train_images.max() > 250
    assert np.ptp(np.bincount(got.test_labels)) <= 3  # stratified
    seen = {image.tobytes() for image in got.train_images}
    assert sum(image.tobytes() in seen for image in got.test_images) == 0
    assert load_data("digits")[1] == info
    # Bilinear weights of an inner pixel sum to one: sixteen new pixels, each 255/16 of the old.
    original = np.sort(load_digits().data.sum(axis=1))
    enlarged = np.concatenate([got.train_images, got.test_images])[..., 0].reshape(-1, 1024)
    np.testing.assert_allclose(np.sort(enlarged.sum(axis=1)), original * 255, rtol=0.1)


def test_hash_is_of_the_content(tmp_path, npz):
    _, python = load_data(str(write_folder(tmp_path / "py", python_files(TINY[10]))))
    digest = hashlib.sha256(b"".join(array.tobytes() for array in TINY[10]))
    assert python.hash == load_data(npz)[1].hash == digest.hexdigest()
    assert load_data(npz, limit_train=5)[1].hash != python.hash


def test_environment_names_the_default(monkeypatch, npz):
    monkeypatch.setenv("FASTCIFAR_DATA", npz)
    assert_same(load_data()[0], TINY[10])
    assert load_data("digits")[1].source == "digits"
    monkeypatch.delenv("FASTCIFAR_DATA")
    monkeypatch.setattr(module, "read_tfds", lambda name: (TINY[10], (name,)))
    assert load_data()[1].classes == ("cifar10",)


def test_a_name_comes_before_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "read_tfds", lambda name: (TINY[100], (name,)))
    write_folder(tmp_path / "cifar10", python_files(TINY[10]))
    assert_same(load_data("cifar10")[0], TINY[100])
    assert_same(load_data("./cifar10")[0], TINY[10])


def test_limit_train(npz):
    got, info = load_data(npz, limit_train=7)
    cut = TINY[10]._replace(train_images=TINY[10].train_images[:7], train_labels=TINY[10].train_labels[:7])
    assert_same(got, cut)
    assert (info.train, info.test) == (7, 10)
    assert load_data(npz, limit_train=20)[1].train == 20
    for limit in (0, -1, 21):
        with pytest.raises(DataError, match=f"limit_train is {limit}; .* has 20 training images: give 1 to 20"):
            load_data(npz, limit_train=limit)


@pytest.mark.parametrize(
    ("path", "fault"),
    [
        ("./nothing", "no file or folder"),
        ("nothing.npz", "no file or folder"),
        ("~nobody/data", "no file or folder"),
        ("./" + "a" * 300, "File name too long"),
        ("./a.txt", "of no known kind; give the path of"),
        ("./folder", "no data of a known kind; give the path of"),
    ],
)
def test_unknown_paths(tmp_path, monkeypatch, path, fault):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path, {"a.txt": b"a"})
    (tmp_path / "folder").mkdir()
    assert fault in refusal(path)
