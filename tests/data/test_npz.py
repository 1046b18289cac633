"""Keras-style npz files: every valid form, and damaged or hostile ones."""

import contextlib
import pickle
import struct
import zipfile

import numpy as np
import pytest

from fastcifar_jax.data import npz
from fastcifar_jax.data.load import load_data
from tests.helpers_data import SMALL, TINY, assert_same, refusal, tiny, write_npz


@pytest.mark.parametrize("column", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.dtype(">u2")])
def test_labels(tmp_path, column, dtype):
    changed = TINY[10]._replace(
        train_labels=TINY[10].train_labels.astype(dtype), test_labels=TINY[10].test_labels.astype(dtype)
    )
    got, info = load_data(str(write_npz(tmp_path / "a.npz", changed, column)))
    assert_same(got, TINY[10])
    assert info.classes == tuple("0123456789")


def test_compression_a_thousand_classes_and_fortran_order(tmp_path):
    wide = tiny(1000)
    fortran = np.asfortranarray(wide.train_images)
    path = write_npz(tmp_path / "a.npz", wide, save=np.savez_compressed, x_train=fortran)
    got, info = load_data(str(path))
    assert_same(got, wide)
    assert len(info.classes) == 1000


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (dict(y_test=None), "y_test is missing"),
        (dict(x_train=np.zeros((20, 32, 32, 3), np.float32)), "x_train is float32"),
        (dict(x_train=np.zeros((20, 3, 32, 32), np.uint8)), "x_train is uint8 (20, 3, 32, 32)"),
        (dict(x_test=np.zeros((0, 32, 32, 3), np.uint8)), "x_test is uint8 (0, 32, 32, 3)"),
        (dict(x_test=np.array([[print]], object)), "x_test is object"),
        (dict(y_test=np.array([None] * 10, object)), "y_test is object"),
        (dict(y_test=np.zeros(10)), "y_test is float64"),
        (dict(y_test=np.zeros(9, int)), "shape (9,) for 10 images"),
        (dict(y_test=np.array(3)), "y_test is int64 ()"),
        (dict(y_train=np.full(20, -1)), "the label -1"),
        (dict(y_train=np.full(20, 1 << 40)), "the label 1099511627776"),
    ],
)
def test_wrong_arrays(tmp_path, change, fault):
    path = tmp_path / "a.npz"
    with contextlib.suppress(TypeError, AttributeError, pickle.PicklingError):
        write_npz(path, TINY[10], **change)
    message = refusal(path)
    assert str(path) in message and fault in message


@pytest.mark.parametrize("share", [0, 0.001, 0.1, 0.5, 0.9])
def test_truncated_files(tmp_path, share):
    path = write_npz(tmp_path / "a.npz", TINY[10])
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert str(path) in refusal(path)


def header(shape, descr="|u1"):
    return repr({"descr": descr, "fortran_order": False, "shape": shape}).encode()


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (header((1 << 46, 32, 32, 3)), "a header of 216,172,782,113,783,808 bytes and holds 3,072"),
        (header((2, 32, 32, 3)), "a header of 6,144 bytes and holds 3,072"),
        (header((-1, 32, 32, 3)), "expected uint8 (n, 32, 32, 3)"),
        (header((1, 32, 32, 3), "|O"), "is object"),
        (b"{'descr': '|u1', 'fortran_order': False, 'shape': __import__('os'), }", "cannot be read"),
        (b"{'descr': '|u1', 'shape': " + b"(" * 5000 + b"}", "cannot be read"),
        (b"[" * 60000, "cannot be read"),
    ],
)
def test_hostile_headers(tmp_path, text, fault):
    path = write_npz(tmp_path / "a.npz", TINY[10], x_train=None)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("x_train.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(3072))
    assert fault in refusal(path)


def test_a_later_version_of_the_header(tmp_path):
    path = write_npz(tmp_path / "a.npz", TINY[10], x_train=None)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("x_train.npy", b"\x93NUMPY\x02\x00\xff\xff\xff\xff")
    assert "version (2, 0)" in refusal(path)


@pytest.mark.parametrize(("method", "size"), [(zipfile.ZIP_BZIP2, 32 << 20), (zipfile.ZIP_LZMA, 5 * 3072)])
def test_other_compression_which_can_unpack_more_than_it_is_asked_for(tmp_path, method, size):
    path, text = write_npz(tmp_path / "a.npz", SMALL, x_train=None), header((5, 32, 32, 3))
    with zipfile.ZipFile(path, "a", method) as archive:
        archive.writestr("x_train.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(size))
    data = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\1\2", 24), (b"PK\3\4", 22)):  # claims the five images that the header describes
        start = data.rfind(mark) + offset
        data[start : start + 4] = struct.pack("<I", 10 + len(text) + 5 * 3072)
    path.write_bytes(data)
    assert len(data) < 1 << 20
    assert f"compressed by method {method}" in refusal(path)


def test_bounds(tmp_path, monkeypatch):
    path = write_npz(tmp_path / "a.npz", TINY[10])
    monkeypatch.setattr(npz, "MAX_LABELS", 9)
    assert "y_train has a header of 80 bytes and holds 80; expected the same, and at most 9" in refusal(path)
    monkeypatch.setattr(npz, "MAX_IMAGES", 3072)
    assert "at most 3,072" in refusal(path)
