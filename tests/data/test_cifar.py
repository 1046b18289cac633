"""CIFAR releases: every published form, and damaged or hostile files."""

import gzip
import os
import pickle
import pickletools
import tarfile
import types

import numpy as np
import pytest

from fastcifar_jax.data import cifar, restricted_pickle
from fastcifar_jax.data.load import load_data
from tests.helpers_data import (
    FILES,
    FOLDERS,
    TINY,
    assert_same,
    binary_files,
    names,
    python2_pickle,
    python_files,
    refusal,
    tar_bytes,
    tiny,
    write_folder,
    write_tar,
)


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("version", ["python", "binary"])
@pytest.mark.parametrize("where", ["folder", "parent", "tar.gz", "tar"])
def test_releases(tmp_path, version, classes, where):
    files, folder = FILES[version](TINY[classes], classes), FOLDERS[version, classes]
    if where in ("folder", "parent"):
        path = write_folder(tmp_path / folder, files)
        path = path if where == "folder" else tmp_path
    else:
        path = write_tar(tmp_path / f"cifar.{where}", files, folder)
        if where == "tar":
            path.write_bytes(gzip.decompress(path.read_bytes()))
    got, info = load_data(str(path))
    assert_same(got, TINY[classes])
    assert info.classes == tuple(names(classes))
    assert (info.source, info.train, info.test) == (str(path), 20, 10)


def of_numpy_1(files):
    # NumPy 2 calls the module numpy._core; an opcode with a length comes before the name from protocol 4 on.
    for new, old in ((b"cnumpy._core.", b"cnumpy.core."), (b"\x13numpy._core.numeric", b"\x12numpy.core.numeric")):
        files = {name: pickled.replace(new, old) for name, pickled in files.items()}
    assert b"numpy._core" not in files["test_batch"]
    # Frames name the length of what follows, so take the one of protocol 5 out.
    return {name: data[:2] + data[11:] if data[2:3] == b"\x95" else data for name, data in files.items()}


PICKLES = {f"protocol {i}": python_files(TINY[10], protocol=i) for i in range(pickle.HIGHEST_PROTOCOL + 1)}
PICKLES |= {f"NumPy 1, protocol {i}": of_numpy_1(python_files(TINY[10], protocol=i)) for i in (2, 5)}
PICKLES["Python 2"] = PICKLES["protocol 2"] | {"test_batch": python2_pickle(*TINY[10][2:])}
PICKLES["label array, Fortran order"] = PICKLES["protocol 2"] | {
    "test_batch": pickle.dumps(
        {
            b"data": np.asfortranarray(pickle.loads(PICKLES["protocol 2"]["test_batch"])[b"data"]),
            b"labels": TINY[10].test_labels.astype(">i8"),
        },
        2,
    )
}


@pytest.mark.parametrize("kind", PICKLES)
@pytest.mark.filterwarnings("ignore:numpy.core")
def test_pickles(tmp_path, kind):
    assert_same(load_data(str(write_folder(tmp_path, PICKLES[kind])))[0], TINY[10])
    assert pickle.loads(PICKLES[kind]["test_batch"], encoding="bytes")[b"data"].shape == (10, 3072)


@pytest.mark.parametrize("version", ["python", "binary"])
def test_missing_copied_and_ambiguous_batches(tmp_path, version):
    files = FILES[version](TINY[10])
    ending = "" if version == "python" else ".bin"
    without = {name: data for name, data in files.items() if name != f"data_batch_3{ending}"}
    assert f"lacks data_batch_3{ending}" in refusal(write_folder(tmp_path / "missing", without))
    assert f"lacks data_batch_3{ending}" in refusal(write_tar(tmp_path / "a.tar.gz", without))
    copied = files | {f"data_batch_4{ending}": files[f"data_batch_2{ending}"]}
    shorter = files | {f"data_batch_5{ending}": FILES[version](tiny(10, 15))[f"data_batch_5{ending}"]}
    assert f"data_batch_5{ending} holds 3 images; expected 4" in refusal(write_folder(tmp_path / "short", shorter))
    assert f"data_batch_4{ending} is a copy of data_batch_2{ending}" in refusal(write_folder(tmp_path / "copy", copied))
    for kind, write in FILES.items():
        write_folder(tmp_path / "two" / FOLDERS[kind, 10], write(TINY[10]))
    assert "more than one data set" in refusal(tmp_path / "two")


def test_a_release_without_names_has_numbered_classes(tmp_path):
    files = python_files(TINY[10])
    del files["batches.meta"]
    assert load_data(str(write_folder(tmp_path, files)))[1].classes == tuple("0123456789")


@pytest.mark.parametrize(
    "content", [b"not a pickle", pickle.dumps({b"a": 1}), pickle.dumps({b"label_names": [1] * 10})]
)
def test_wrong_class_names(tmp_path, content):
    assert "batches.meta" in refusal(write_folder(tmp_path, python_files(TINY[10]) | {"batches.meta": content}))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (dict(data=None), "expected 'data' and 'labels'"),
        (dict(labels=None), "expected 'data' and 'labels'"),
        (dict(data=np.zeros((4, 3072), np.float32)), "type '<f4'"),
        (dict(data=np.zeros((4, 3072), np.int8)), "int8 (4, 3072); expected uint8"),
        (dict(data=np.zeros((4, 3071), np.uint8)), "uint8 (4, 3071); expected"),
        (dict(data=np.zeros((4, 32, 32, 3), np.uint8)), "uint8 (4, 32, 32, 3); expected"),
        (dict(data=np.zeros((0, 3072), np.uint8), labels=[]), "no images"),
        (dict(data=[1, 2]), "images as list"),
        (dict(data=print), "asks for 'builtins.print'"),
        (dict(data=np.array([[1, "a"]], object)), "type '|O8'"),
        (dict(data=np.zeros(3, "u1,i4")), "type '|V5'"),
        (dict(labels=[0, 1, 2]), "shape (3,) for 4 images"),
        (dict(labels=[0, 1, 2, -1]), "the label -1; expected 0 to 9"),
        (dict(labels=[0, 1, 2, 10]), "the label 10; expected 0 to 9"),
        (dict(labels=[0, 1, 2, 1 << 80]), "labels of type object"),
        (dict(labels=[0, 1, 2, "3"]), "not integers"),
        (dict(labels=[0, 1, 2, 3.0]), "not integers"),
        (dict(labels=(0, 1, 2, 3)), "not integers"),
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


@pytest.mark.parametrize("share", [0, 0.001, 0.1, 0.5, 0.999])
def test_truncated_files(tmp_path, share):
    for version, name in (("python", "data_batch_5"), ("binary", "data_batch_5.bin")):
        files = FILES[version](TINY[10])
        files[name] = files[name][: int(share * len(files[name]))]
        assert name in refusal(write_folder(tmp_path / version, files))
        assert name in refusal(write_tar(tmp_path / "a.tar.gz", files))
    packed = write_tar(tmp_path / "whole.tar.gz", binary_files(TINY[10])).read_bytes()
    for ending, content in (("tar.gz", packed), ("tar", gzip.decompress(packed))):
        path = tmp_path / f"cut.{ending}"
        path.write_bytes(content[: int(min(share, 0.9) * len(content))])
        assert str(path) in refusal(path)


class Calls:
    """Pickles as a call of any function."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def array(shape, dtype=b"cnumpy\ndtype\nU\x02u1\x85R"):
    """A pickle of {"data": an array of one byte} with this pickled shape and type."""
    head = b"\x80\x02}U\x04datacnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"
    return head + b"(K\x01" + shape + dtype + b"\x89U\x01atbs."


def length(opcode):
    """A pickle with an opcode whose value claims 64 TiB."""
    return b"\x80\x05" + opcode + (1 << 46).to_bytes(8, "little") + b"abc."


HUGE = b"\x8a\x06\x00\x00\x00\x00\x00\x40"  # 2**46
NESTED = b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60))  # t = (t, t), 60 times
PICKLED = {
    "system": (pickle.dumps(Calls(os.system, "true")), "system"),
    "eval": (pickle.dumps(Calls(eval, "1")), "asks for 'builtins.eval'"),
    "eval of protocol 0": (pickle.dumps(Calls(eval, "1"), 0), "asks for '__builtin__.eval'"),
    "frombuffer": (b"\x80\x02cnumpy\nfrombuffer\n)R.", "asks for 'numpy.frombuffer'"),
    "attribute": (b"\x80\x02cnumpy.core.multiarray\n_reconstruct.__globals__\n)R.", "asks for"),
    "INST": (b"\x80\x02(ios\nsystem\n.", "asks for 'os.system'"),
    "NEWOBJ": (pickle.dumps(types.SimpleNamespace(), 2), "asks for 'types.SimpleNamespace'"),
    "NEWOBJ of an allowed name": (b"\x80\x02cnumpy\nndarray\n)\x81.", "TypeError"),
    "PERSID": (b"Pname\n.", "persistent id"),
    "EXT1": (b"\x80\x02\x82\x01.", "unregistered extension code 1"),
    "set": (pickle.dumps({b"data": {1}}, 4), "holds a set"),
    "frozenset": (pickle.dumps({b"data": frozenset({1})}, 4), "holds a set"),
    "no type": (array(b"K\x01\x85", dtype=b"N")[:-1] + b"U\x06labels]s.", "images as _Call"),
    "huge reconstruct": (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + HUGE + b"\x85U\x01btR.",
        "holds a _Call; expected a dictionary",
    ),
    "huge shape": (array(HUGE + b"\x85"), "cannot reshape array of size 1"),
    "negative shape": (array(b"J\xff\xff\xff\xffJ\xff\xff\xff\xff\x86"), "can only specify one unknown dimension"),
    "many dimensions": (array(b"(" + b"K\x01" * 1000 + b"t"), "ValueError"),
    "nested shape": (array(b")" + NESTED), "TypeError"),
    "strange byte order": (
        array(b"K\x01\x85", dtype=b"cnumpy\ndtype\nU\x02u1\x85R(K\x03U\x08(9,9)u1,tb"),
        "type '(9,9)u1,u1'",
    ),
    "huge bytes": (length(b"\x8e"), "expected 70368744177664 bytes"),
    "huge bytearray": (length(b"\x96"), "expected 70368744177664 bytes"),
    "huge text": (length(b"\x8d"), "expected 70368744177664 bytes"),
    "huge frame": (b"\x80\x04\x95" + (1 << 46).to_bytes(8, "little") + b"}.", "expected 'data' and 'labels'"),
    "huge memo": (b"\x80\x02}r\xff\xff\xff\x7f.", "expected 'data' and 'labels'"),
    "many copies": (
        b"\x80\x02}U\x04data(c_codecs\nencode\nq\x00X\x10\x27\x00\x00" + b"a" * 10_000 + b"q\x01U\x06latin1\x86R" +
        b"h\x00h\x01U\x06latin1\x86R" * 10_000 + b"lsU\x06labels]s.",
        "images as list",
    ),
    "deep lists": (b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", "holds a list"),
    "deep tuples": (b"\x80\x02)" + b"\x85" * 100_000 + b".", "holds a tuple"),
    "BUILD of a function": (b"\x80\x02c_codecs\nencode\n}U\x08__code__K\x01sb.", "expected a dictionary"),
    "no dictionary": (pickle.dumps([1, 2]), "holds a list"),
    "no end": (b"\x80\x02}", "pickle exhausted before seeing STOP"),
    "nothing to pop": (b"\x80\x02R.", "IndexError"),
    "tuples of tuples as a key": (b"\x80\x02})" + NESTED + b"K\x01s.", "holds a tuple; expected text"),
    "tuples of tuples as labels": (
        array(b"K\x01\x85")[:-1] + b"U\x06labels)" + NESTED + b"s.",
        "uint8 (1,); expected",
    ),
    "self-containing": (b"\x80\x02]q\x00h\x00a.", "holds a list"),
    "many dictionaries": (b"\x80\x02" + b"}" * 300_000 + b".", "more than 300,000 opcodes"),
}  # fmt: skip


@pytest.mark.parametrize("kind", PICKLED)
def test_hostile_pickles(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(restricted_pickle, "MAX_OPCODES", 300_000)
    pickled, fault = PICKLED[kind]
    message = refusal(write_folder(tmp_path, python_files(TINY[10]) | {"data_batch_1": pickled}))
    assert "data_batch_1" in message and fault in message


def test_real_pickles_have_far_fewer_opcodes_than_are_read():
    labels = list(range(100)) * 500
    batch = {b"fine_labels": labels, b"coarse_labels": labels, b"data": np.zeros((1, 3072), np.uint8)}
    batch[b"filenames"] = [f"{i}.png".encode() for i in range(50_000)]
    for protocol in (2, 5):
        count = sum(1 for _ in pickletools.genops(pickle.dumps(batch, protocol)))
        assert count < restricted_pickle.MAX_OPCODES / 2


def member(name, size=0, kind=tarfile.REGTYPE, target=""):
    info = tarfile.TarInfo(f"cifar-10-batches-py/{name}" if name[0] != "/" else name)
    info.size, info.type, info.linkname = size, kind, target
    return info


@pytest.mark.parametrize(
    ("extra", "fault"),
    [
        (member("/etc/data_batch_1"), "is there twice"),
        (member("../../test_batch"), "is there twice"),
        (member("data_batch_5", kind=tarfile.SYMTYPE, target="/etc/passwd"), "not a regular file"),
        (member("data_batch_5", kind=tarfile.LNKTYPE, target="data_batch_1"), "not a regular file"),
        (member("data_batch_5", kind=tarfile.FIFOTYPE), "not a regular file"),
        (member("data_batch_5", size=1 << 40), "cannot be read"),
        (member("data_batch_5", size=1 << 20), "cannot be read"),
        (member("data_batch_1"), "is there twice"),
        (member("x" * 60, kind=tarfile.GNUTYPE_LONGNAME, size=1 << 40), "cannot be read"),
        (member("x", kind=tarfile.XHDTYPE, size=1 << 40), "cannot be read"),
    ],
)
def test_hostile_archives(tmp_path, extra, fault):
    files = python_files(TINY[10])
    del files["data_batch_5"]
    message = refusal(write_tar(tmp_path / "a.tar.gz", files, extra=[extra]))
    assert "a.tar.gz" in message and fault in message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar.gz"]  # nothing was unpacked


def test_bounds(tmp_path, monkeypatch):
    long = binary_files(TINY[10]) | {"batches.meta.txt": b"a " * (1 << 20)}
    assert "expected at most 65,536" in refusal(write_tar(tmp_path / "names.tar.gz", long))
    monkeypatch.setattr(cifar, "MAX_ARCHIVE", 1 << 20)
    path = write_tar(tmp_path / "bomb.tar.gz", {"readme.html": bytes(32 << 20)})
    assert path.stat().st_size < 1 << 18
    assert "unpacks into over 1,048,576 bytes" in refusal(path)
    path.write_bytes(tar_bytes({"readme.html": bytes(1 << 20)}))
    assert "expected at most 1,048,576" in refusal(path)
    monkeypatch.setattr(cifar, "MAX_MEMBERS", 2)
    assert "more than 2 files" in refusal(write_tar(tmp_path / "many.tar.gz", {"a": b"", "b": b"", "c": b""}))
    assert "expected one CIFAR release" in refusal(write_tar(tmp_path / "other.tar.gz", {"a": b""}))
    monkeypatch.setattr(cifar, "MAX_BATCH", 9)
    assert "expected at most 9;" in refusal(write_folder(tmp_path / "big", binary_files(TINY[10])))
