"""Files made to harm: refused with one DataError, whatever the bytes."""

import contextlib
import gzip
import io
import os
import pickle
import tarfile
import types
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fastcifar_jax.data import readers
from fastcifar_jax.data.load import DataError, load
from tests.helpers_data import (
    TINY,
    binary_files,
    python_files,
    refusal,
    tar_bytes,
    tiny,
    write_folder,
    write_images,
    write_npz,
    write_tar,
)


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
