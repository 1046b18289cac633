import contextlib
import gzip
import hashlib
import http.server
import io
import os
import pickle
import socket
import subprocess
import sys
import tarfile
import threading
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import requests
from helpers_data import (
    FOLDERS,
    binary_files,
    names,
    python2_pickle,
    python_files,
    tar_bytes,
    tiny,
    write_folder,
    write_images,
    write_npz,
    write_tar,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fastcifar_jax import data as data_module
from fastcifar_jax import readers
from fastcifar_jax.data import DataError, load

TINY = {10: tiny(10), 100: tiny(100)}
FILES = {"python": python_files, "binary": binary_files}


def assert_same(got, expected):
    for a, b, name in zip(got, expected, expected._fields, strict=True):
        assert a.dtype == (np.uint8 if "images" in name else np.int32)
        assert a.flags.c_contiguous
        np.testing.assert_array_equal(a, b, err_msg=name)


def refusal(path):
    """The message of the DataError that reading `path` ends in."""
    with pytest.raises(DataError) as caught:
        load(str(path))
    return str(caught.value)


# Every format holds the same images.


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("version", ["python", "binary"])
@pytest.mark.parametrize("where", ["folder", "parent", "tar.gz", "tar"])
def test_cifar_releases(tmp_path, version, classes, where):
    files, folder = FILES[version](TINY[classes], classes), FOLDERS[version, classes]
    if where in ("folder", "parent"):
        path = write_folder(tmp_path / folder, files)
        path = path if where == "folder" else tmp_path
    else:
        path = write_tar(tmp_path / f"cifar.{where}", files, folder)
        if where == "tar":
            path.write_bytes(gzip.decompress(path.read_bytes()))
    got, info = load(str(path))
    assert_same(got, TINY[classes])
    assert info.classes == tuple(names(classes))
    assert (info.source, info.train, info.test) == (str(path), 20, 10)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_pickle_protocol(tmp_path, protocol):
    got, _ = load(str(write_folder(tmp_path, python_files(TINY[10], protocol=protocol))))
    assert_same(got, TINY[10])


@pytest.mark.parametrize("protocol", [2, 5])
def test_pickles_of_numpy_1(tmp_path, protocol):
    files = python_files(TINY[10], protocol=protocol)
    # NumPy 2 calls the module numpy._core; an opcode with a length comes before the name from protocol 4 on.
    for new, old in ((b"cnumpy._core.", b"cnumpy.core."), (b"\x13numpy._core.numeric", b"\x12numpy.core.numeric")):
        files = {name: pickled.replace(new, old) for name, pickled in files.items()}
    # Frames name the length of what follows, so take the one of protocol 5 out.
    files = {n: p[:2] + p[11:] if p[2:3] == b"\x95" else p for n, p in files.items()}
    assert b"numpy._core" not in files["test_batch"]
    got, _ = load(str(write_folder(tmp_path, files)))
    assert_same(got, TINY[10])


def test_pickles_of_python_2(tmp_path):
    files = python_files(TINY[10])
    files["test_batch"] = python2_pickle(TINY[10].test_images, TINY[10].test_labels)
    assert pickle.loads(files["test_batch"], encoding="bytes")[b"data"].shape == (10, 3072)
    got, _ = load(str(write_folder(tmp_path, files)))
    assert_same(got, TINY[10])


def test_fortran_order_and_label_arrays(tmp_path):
    changed = tiny(10, 20, 20)
    files = python_files(changed)
    batch = pickle.loads(files["test_batch"])
    batch = {b"data": np.asfortranarray(batch[b"data"]), b"labels": np.array(batch[b"labels"], ">i8")}
    files["test_batch"] = pickle.dumps(batch, 2)
    got, _ = load(str(write_folder(tmp_path / "py", files)))
    assert_same(got, changed)
    npz = write_npz(tmp_path / "a.npz", changed, x_train=np.asfortranarray(changed.train_images))
    assert_same(load(str(npz))[0], changed)


@pytest.mark.parametrize("column", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.dtype(">u2")])
def test_npz(tmp_path, column, dtype):
    cast = TINY[10]._replace(
        train_labels=TINY[10].train_labels.astype(dtype), test_labels=TINY[10].test_labels.astype(dtype)
    )
    got, info = load(str(write_npz(tmp_path / "a.npz", cast, column)))
    assert_same(got, TINY[10])
    assert info.classes == tuple("0123456789")


def test_npz_compressed_with_a_thousand_classes(tmp_path):
    wide = tiny(1000)
    fields = ("x_train", "y_train", "x_test", "y_test")
    np.savez_compressed(tmp_path / "a.npz", **dict(zip(fields, wide, strict=True)))
    got, info = load(str(tmp_path / "a.npz"))
    assert_same(got, wide)
    assert len(info.classes) == 1000


def test_image_folders(tmp_path):
    path = write_images(tmp_path, TINY[10])
    (path / "train" / names(10)[0] / ".DS_Store").write_bytes(b"no image")
    got, info = load(str(path))
    assert info.classes == tuple(names(10))

    def content(images, labels):
        return sorted((int(y), x.tobytes()) for x, y in zip(images, labels, strict=True))

    assert content(*got[:2]) == content(*TINY[10][:2])
    assert content(*got[2:]) == content(*TINY[10][2:])
    assert list(got.train_labels) != sorted(got.train_labels)  # the first n images hold several classes
    assert_same(load(str(path))[0], got)


def test_image_folders_convert_to_rgb(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split / "grey").mkdir(parents=True)
        Image.new("L", (32, 32), 7).save(tmp_path / split / "grey" / "a.jpg", quality=100)
        Image.new("RGBA", (32, 32), (7, 7, 7, 9)).save(tmp_path / split / "grey" / "b.PNG")
    got, _ = load(str(tmp_path))
    assert (got.train_images == 7).all()


def test_digits():
    got, info = load("digits")
    assert (info.train, info.test, info.classes) == (1437, 360, tuple("0123456789"))
    assert got.train_images.shape == (1437, 32, 32, 3)
    assert got.train_images.dtype == np.uint8 and got.train_labels.dtype == np.int32
    assert got.train_images.min() == 0 and got.train_images.max() > 250
    assert np.ptp(np.bincount(got.test_labels)) <= 3  # stratified
    seen = {image.tobytes() for image in got.train_images}
    assert sum(image.tobytes() in seen for image in got.test_images) == 0
    assert load("digits")[1] == info


def test_digits_keep_the_mean_of_each_block():
    from sklearn.datasets import load_digits

    original = np.sort(load_digits().data.sum(axis=1))
    got, _ = load("digits")
    enlarged = np.concatenate([got.train_images, got.test_images])[..., 0].reshape(-1, 1024)
    # Bilinear weights of an inner pixel sum to one: sixteen new pixels, each 255/16 of the old.
    np.testing.assert_allclose(np.sort(enlarged.sum(axis=1)), original * 255, rtol=0.1)


def test_hash_is_of_the_content(tmp_path):
    _, python = load(str(write_folder(tmp_path / "py", python_files(TINY[10]))))
    _, npz = load(str(write_npz(tmp_path / "a.npz", TINY[10])))
    digest = hashlib.sha256(b"".join(array.tobytes() for array in TINY[10]))
    assert python.hash == npz.hash == digest.hexdigest()
    assert load(str(tmp_path / "a.npz"), limit_train=5)[1].hash != npz.hash


def test_environment_names_the_default(tmp_path, monkeypatch):
    path = write_npz(tmp_path / "a.npz", TINY[10])
    monkeypatch.setenv("FASTCIFAR_DATA", str(path))
    assert_same(load()[0], TINY[10])
    assert load("digits")[1].source == "digits"
    monkeypatch.delenv("FASTCIFAR_DATA")
    monkeypatch.setattr(data_module, "_read_tfds", lambda name: (TINY[10], (name,)))
    assert load()[1].classes == ("cifar10",)


def test_limit_train(tmp_path):
    path = str(write_npz(tmp_path / "a.npz", TINY[10]))
    got, info = load(path, limit_train=7)
    cut = TINY[10]._replace(train_images=TINY[10].train_images[:7], train_labels=TINY[10].train_labels[:7])
    assert_same(got, cut)
    assert (info.train, info.test) == (7, 10)
    assert load(path, limit_train=20)[1].train == 20
    for limit in (0, -1, 21):
        with pytest.raises(DataError, match=f"limit_train is {limit}; .* has 20 training images: give 1 to 20"):
            load(path, limit_train=limit)


# Faults. Each has a message with the file's name and the fault.


@pytest.mark.parametrize("version", ["python", "binary"])
def test_missing_copied_and_ambiguous_batches(tmp_path, version):
    files = FILES[version](TINY[10])
    ending = "" if version == "python" else ".bin"
    without = {name: data for name, data in files.items() if name != f"data_batch_3{ending}"}
    assert f"lacks data_batch_3{ending}" in refusal(write_folder(tmp_path / "missing", without))
    assert f"lacks data_batch_3{ending}" in refusal(write_tar(tmp_path / "a.tar.gz", without))
    copied = files | {f"data_batch_4{ending}": files[f"data_batch_2{ending}"]}
    shorter = files | {f"data_batch_5{ending}": FILES[version](tiny(10, 15))[f"data_batch_5{ending}"]}
    assert f"data_batch_5{ending} holds 3 images, others 4" in refusal(write_folder(tmp_path / "short", shorter))
    assert f"data_batch_4{ending} is a copy of data_batch_2{ending}" in refusal(write_folder(tmp_path / "copy", copied))
    for kind, write in FILES.items():
        write_folder(tmp_path / "two" / FOLDERS[kind, 10], write(TINY[10]))
    assert "more than one data set" in refusal(tmp_path / "two")


def test_a_release_without_names_has_numbered_classes(tmp_path):
    files = python_files(TINY[10])
    del files["batches.meta"]
    assert load(str(write_folder(tmp_path, files)))[1].classes == tuple("0123456789")


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (dict(data=None), "expected 'data' and 'labels'"),
        (dict(labels=None), "expected 'data' and 'labels'"),
        (dict(data=np.zeros((4, 3072), np.float32)), "type 'f4'"),
        (dict(data=np.zeros((4, 3072), np.int8)), "int8 (4, 3072); expected a uint8 array"),
        (dict(data=np.zeros((4, 3071), np.uint8)), "uint8 (4, 3071); expected"),
        (dict(data=np.zeros((4, 32, 32, 3), np.uint8)), "uint8 (4, 32, 32, 3); expected"),
        (dict(data=np.zeros((0, 3072), np.uint8), labels=[]), "no images"),
        (dict(data=[1, 2]), "images as list"),
        (dict(data=print), "asks for 'builtins.print'"),
        (dict(data=np.array([[1, "a"]], object)), "type 'O8'"),
        (dict(labels=[0, 1, 2]), "shape (3,) for 4 images"),
        (dict(labels=[0, 1, 2, -1]), "the label -1; expected 0 to 9"),
        (dict(labels=[0, 1, 2, 10]), "the label 10; expected 0 to 9"),
        (dict(labels=[0, 1, 2, 1 << 80]), "labels of type object"),
        (dict(labels=[0, 1, 2, "3"]), "no list of integers"),
        (dict(labels=[0, 1, 2, 3.0]), "BINFLOAT"),
        (dict(labels=np.zeros((4, 2), np.int64)), "shape (4, 2) for 4 images"),
    ],
)
def test_wrong_batches(tmp_path, change, fault):
    files = python_files(TINY[10])
    files["data_batch_2"] = python_files(TINY[10], protocol=4, **change)["data_batch_2"]
    message = refusal(write_folder(tmp_path, files))
    assert "data_batch_2" in message and fault in message


@pytest.mark.parametrize("value", [10, 255])
def test_wrong_labels_in_a_binary_batch(tmp_path, value):
    files = binary_files(TINY[10])
    files["test_batch.bin"] = bytes([value]) + files["test_batch.bin"][1:]
    assert f"test_batch.bin holds the label {value}" in refusal(write_folder(tmp_path, files))


@pytest.mark.parametrize("version", ["python", "binary"])
@pytest.mark.parametrize("share", [0, 0.001, 0.1, 0.5, 0.999])
def test_truncated_batches(tmp_path, version, share):
    files = FILES[version](TINY[10])
    name = "data_batch_5" if version == "python" else "data_batch_5.bin"
    files[name] = files[name][: int(share * len(files[name]))]
    assert name in refusal(write_folder(tmp_path / "folder", files))
    assert name in refusal(write_tar(tmp_path / "a.tar.gz", files))


@pytest.mark.parametrize("share", [0, 0.001, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("kind", ["tar.gz", "tar", "npz"])
def test_truncated_files(tmp_path, kind, share):
    path = tmp_path / f"a.{kind}"
    if kind == "npz":
        write_npz(path, TINY[10])
    else:
        write_tar(path, binary_files(TINY[10]))
    content = gzip.decompress(path.read_bytes()) if kind == "tar" else path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert str(path) in refusal(path)


@pytest.mark.parametrize("files", [{}, {"batches.meta": b"not a pickle"}, {"batches.meta": pickle.dumps({b"a": 1})}])
def test_wrong_class_names(tmp_path, files):
    if files:
        assert "batches.meta" in refusal(write_folder(tmp_path, python_files(TINY[10]) | files))
    else:
        assert "holds no data of a known kind" in refusal(tmp_path)


class Calls:
    """Pickles as a call of any function."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def call(module, name, args=b")", more=b""):
    """A pickle that calls `module.name` with the pickled tuple `args`."""
    return b"\x80\x02c" + module + b"\n" + name + b"\n" + args + b"R" + more + b"."


RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n"
U1 = b"cnumpy\ndtype\nU\x02u1\x85R"
HUGE = b"\x8a\x06\x00\x00\x00\x00\x00\x40"  # 2**46
HOSTILE = {
    "system": (pickle.dumps(Calls(os.system, "true")), "system"),
    "eval": (pickle.dumps(Calls(eval, "1")), "asks for 'builtins.eval'"),
    "eval of protocol 0": (pickle.dumps(Calls(eval, "1"), 0), "asks for '__builtin__.eval'"),
    "frombuffer": (call(b"numpy", b"frombuffer"), "asks for 'numpy.frombuffer'"),
    "attribute": (call(b"numpy.core.multiarray", b"_reconstruct.__globals__"), "asks for"),
    "INST": (b"\x80\x02(ios\nsystem\n.", "INST"),
    "NEWOBJ": (pickle.dumps(types.SimpleNamespace(), 2), "asks for 'types.SimpleNamespace'"),
    "PERSID": (b"Pname\n.", "PERSID"),
    "EXT1": (b"\x80\x02\x82\x01.", "EXT1"),
    "object array": (pickle.dumps(np.array([{}], object)), "type 'O8'"),
    "structured array": (pickle.dumps(np.zeros(3, "u1,i4")), "type"),
    "huge reconstruct": (b"\x80\x02" + RECONSTRUCT + HUGE + b"\x85U\x01btR.", "holds a _Array"),
    "huge shape": (
        b"\x80\x02}U\x04data" + RECONSTRUCT + b"K\x00\x85U\x01btR(K\x01" + HUGE + b"\x85" + U1 + b"\x89U\x01atbs.",
        "array of shape (70368744177664,) in 1 bytes",
    ),
    "strange byte order": (
        b"\x80\x02}U\x04data" + U1 + b"(K\x03U\x08(9,9)u1,NNNK\x00K\x00K\x00tbs.",
        "byte order '(9,9)u1,'",
    ),
    "negative shape": (
        b"\x80\x02}U\x04data" + RECONSTRUCT + b"K\x00\x85U\x01btR(K\x01J\xff\xff\xff\xffJ\xff\xff\xff\xff\x86"
        + U1 + b"\x89U\x01atbs.",
        "negative",
    ),
    "huge bytes": (b"\x80\x04\x8e" + (1 << 46).to_bytes(8, "little") + b"abc.", "expected 70368744177664 bytes"),
    "huge bytearray": (b"\x80\x05\x96" + (1 << 46).to_bytes(8, "little") + b"abc.", "expected 70368744177664 bytes"),
    "huge text": (b"\x80\x04\x8d" + (1 << 46).to_bytes(8, "little") + b"abc.", "expected 70368744177664 bytes"),
    "huge memo": (b"\x80\x02}r\xff\xff\xff\x7f.", "LONG_BINPUT 2147483647"),
    "huge frame": (b"\x80\x04\x95" + (1 << 46).to_bytes(8, "little") + b"}.", "truncated"),
    "many copies": (
        b"\x80\x02c_codecs\nencode\nq\x00X" + (1000).to_bytes(4, "little") + b"a" * 1000 + b"q\x01"
        + b"h\x00h\x01U\x06latin1\x86R" * 1000 + b".",
        "copies more bytes than it holds",
    ),
    "deep lists": (b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", "holds a list"),
    "deep tuples": (b"\x80\x02)" + b"\x85" * 100_000 + b".", "holds a tuple"),
    "BUILD of a function": (b"\x80\x02c_codecs\nencode\n}U\x08__code__K\x01sb.", ""),
    "no dictionary": (pickle.dumps([1, 2]), "holds a list"),
    "no end": (b"\x80\x02}", "pickle exhausted before seeing STOP"),
    "nothing to pop": (b"\x80\x02R.", ""),
    "tuples of tuples as a key": (
        b"\x80\x02}K\x01" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60)) + b"K\x01s.",
        "again and again",
    ),
    "many dimensions": (
        b"\x80\x02}U\x04data" + RECONSTRUCT + b"K\x00\x85U\x01btR(K\x01(" + b"K\x01" * 1000 + b"t" + U1
        + b"\x89U\x01atbs.",
        "in 1 bytes",
    ),
    "self-containing": (b"\x80\x02]q\x00h\x00a.", "holds a list"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_pickles(tmp_path, kind):
    pickled, fault = HOSTILE[kind]
    message = refusal(write_folder(tmp_path, python_files(TINY[10]) | {"data_batch_1": pickled}))
    assert "data_batch_1" in message and fault in message


def member(name, size=0, kind=tarfile.REGTYPE, target=""):
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, target
    return info


@pytest.mark.parametrize(
    ("extra", "fault"),
    [
        (member("/etc/data_batch_1"), "outside its folder"),
        (member("cifar-10-batches-py/../../test_batch"), "outside its folder"),
        (member("cifar-10-batches-py/data_batch_5", kind=tarfile.SYMTYPE, target="/etc/passwd"), "link"),
        (member("cifar-10-batches-py/data_batch_5", kind=tarfile.LNKTYPE, target="data_batch_1"), "link"),
        (member("cifar-10-batches-py/data_batch_5", kind=tarfile.FIFOTYPE), "no plain file"),
        (member("cifar-10-batches-py/data_batch_5", size=1 << 40), "claims 1099511627776 bytes"),
        (member("cifar-10-batches-py/data_batch_5", size=1 << 20), "cannot be read"),
        (member("cifar-10-batches-py/data_batch_1"), "holds data_batch_1 twice"),
        (member("cifar-10-batches-py/x" * 60, kind=tarfile.GNUTYPE_LONGNAME, size=1 << 40), "cannot be read"),
    ],
)
def test_hostile_archives(tmp_path, extra, fault):
    files = python_files(TINY[10])
    del files["data_batch_5"]
    message = refusal(write_tar(tmp_path / "a.tar.gz", files, extra=[extra]))
    assert "a.tar.gz" in message and fault in message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar.gz"]  # nothing was unpacked


def test_archives_are_bounded(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "bomb.tar.gz", {"readme.html": bytes(1 << 20)})
    monkeypatch.setattr(readers, "MAX_ARCHIVE", 1 << 19)
    assert path.stat().st_size < 1 << 12
    assert "unpacks into more than 524288 bytes" in refusal(path)
    monkeypatch.setattr(readers, "MAX_MEMBERS", 2)
    assert "more than 2 files" in refusal(write_tar(tmp_path / "many.tar.gz", {"a": b"", "b": b"", "c": b""}))
    assert "no single CIFAR release" in refusal(write_tar(tmp_path / "other.tar.gz", {"a": b""}))
    monkeypatch.setattr(readers, "MAX_BATCH", 9)
    assert "more than 9 bytes" in refusal(write_folder(tmp_path / "big", binary_files(TINY[10])))


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
def test_wrong_npz(tmp_path, change, fault):
    path = tmp_path / "a.npz"
    with contextlib.suppress(TypeError, AttributeError, pickle.PicklingError):
        write_npz(path, TINY[10], **change)
    message = refusal(path)
    assert str(path) in message and fault in message


@pytest.mark.parametrize(
    ("header", "fault"),
    [
        (
            b"{'descr': '|u1', 'fortran_order': False, 'shape': (70368744177664, 32, 32, 3), }",
            "claims 216172782113783808",
        ),
        (b"{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 32, 32, 3), }", "expected uint8 images"),
        (b"{'descr': '|O', 'fortran_order': False, 'shape': (1, 32, 32, 3), }", "object"),
        (b"{'descr': '|u1', 'fortran_order': False, 'shape': __import__('os'), }", "cannot be read"),
        (b"{'descr': '|u1', 'shape': " + b"(" * 5000 + b"}", "cannot be read"),
        (b"[" * 60000, "cannot be read"),
    ],
)
def test_hostile_npz_headers(tmp_path, header, fault):
    path = write_npz(tmp_path / "a.npz", TINY[10], x_train=None)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("x_train.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(3072))
    assert fault in refusal(path)


def test_other_npz_versions_and_bounds(tmp_path, monkeypatch):
    path = write_npz(tmp_path / "a.npz", TINY[10], x_train=None)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("x_train.npy", b"\x93NUMPY\x02\x00\xff\xff\xff\xff")
    assert "version (2, 0)" in refusal(path)
    monkeypatch.setattr(readers, "MAX_ARRAY", 3072)
    assert "at most 3072 are read" in refusal(write_npz(tmp_path / "b.npz", TINY[10]))


def test_wrong_image_folders(tmp_path):
    path = write_images(tmp_path / "a", TINY[10])
    victim = next((path / "train").rglob("*.png"))
    good = victim.read_bytes()
    for content, fault in [
        (b"", "cannot be read"),
        (b"GIF89a", "cannot be read"),
        (good[:100], "cannot be read"),
        (good[:-200], "cannot be read"),
        (bytes(readers.MAX_IMAGE + 1), "the most that is read"),
    ]:
        victim.write_bytes(content)
        message = refusal(path)
        assert str(victim) in message and fault in message
    for size, fault in ((32, 31), "32x31 pixels; expected 32x32"), ((20_000, 20_000), "DecompressionBomb"):
        Image.new("1", size).save(victim)
        message = refusal(path)
        assert str(victim) in message and fault in message
    victim.write_bytes(good)
    (path / "test" / "zebra").mkdir()
    assert "zebra" in refusal(path)
    assert "no folder test" in refusal(write_folder(tmp_path / "b" / "train", {}).parent)
    write_folder(tmp_path / "b" / "test", {})
    assert "holds no images" in refusal(tmp_path / "b")


def test_unknown_paths(tmp_path):
    assert "no file or folder" in refusal(tmp_path / "nothing")
    assert "no file or folder" in refusal("nothing.npz")
    assert "File name too long" in refusal("./" + "a" * 300)
    assert "no such file" in refusal("a" * 300)
    assert "no file or folder" in refusal("~nobody/data")
    assert "of no known kind" in refusal(write_folder(tmp_path, {"a.txt": b"a"}) / "a.txt")


# Fuzzing: whatever the bytes, the only error is DataError.


def mutated(content):
    """Strategies of `content` with a piece cut out, repeated or overwritten."""
    position = st.integers(0, len(content))
    return st.builds(
        lambda start, length, piece, times: content[:start] + piece * times + content[start + length :],
        position,
        st.one_of(st.integers(0, 8), position),
        st.binary(max_size=8),
        st.integers(0, 3),
    )


def in_memory(write):
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


SMALL = tiny(10, 5, 1)
VALID = {
    "pickle": python_files(SMALL)["data_batch_1"],
    "pickle5": python_files(SMALL, protocol=5)["data_batch_1"],
    "binary": binary_files(SMALL)["data_batch_1.bin"],
    "tar": tar_bytes(binary_files(SMALL)),
    "tar.gz": gzip.compress(tar_bytes(binary_files(SMALL)), mtime=0),
    "npz": in_memory(lambda buffer: write_npz(buffer, SMALL)),
    "png": in_memory(lambda buffer: Image.fromarray(SMALL.test_images[0]).save(buffer, "png")),
}


@pytest.mark.parametrize("kind", VALID)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(draw=st.data())
def test_only_data_errors(tmp_path, kind, draw):
    content = draw.draw(st.one_of(st.binary(max_size=300), mutated(VALID[kind])))
    if kind.startswith("pickle"):
        path = write_folder(tmp_path / kind, python_files(SMALL) | {"data_batch_1": content})
    elif kind == "binary":
        path = write_folder(tmp_path / kind, binary_files(SMALL) | {"data_batch_1.bin": content})
    elif kind == "png":
        for split in ("train", "test"):
            path = write_folder(tmp_path / kind / split / "a", {"a.png": content}).parent.parent
    else:
        path = tmp_path / f"a.{kind}"
        path.write_bytes(content)
    with contextlib.suppress(DataError):
        load(str(path))


# tensorflow-datasets.

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


from fastcifar_jax.data import load

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
    environment = os.environ | {"TFDS_DATA_DIR": str(tmp_path), "PYTHONPATH": str(Path(readers.__file__).parents[1])}
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
