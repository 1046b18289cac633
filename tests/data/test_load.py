"""What holds for every source: names, paths, limits, hashes, and files of any bytes."""

import contextlib
import gzip
import hashlib
import pickletools
import tracemalloc

import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from fastcifar_jax.data import load as module
from fastcifar_jax.data.load import DataError, load_data
from tests.helpers_data import (
    SMALL,
    TINY,
    assert_same,
    binary_files,
    python_files,
    refusal,
    saved,
    tar_bytes,
    write_folder,
    write_images,
    write_npz,
)  # fmt: skip
from tests.helpers_fuzz import COUNTS, SENTINEL, fuzz, mutants


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


# Whatever the bytes of a file: data or one DataError, nothing executed, and few allocations. Bytes are changed blindly,
# and opcodes of pickles and fields of tar headers with care, so that only the claims are false.

PYTHON, BINARY = {n: python_files(SMALL, protocol=n) for n in (2, 5)}, binary_files(SMALL)
TAR, NPZ = tar_bytes(BINARY), saved(lambda buffer: write_npz(buffer, SMALL))
PNG, JPEG = (
    saved(lambda buffer, ending=ending: Image.fromarray(SMALL.test_images[0]).save(buffer, ending))
    for ending in ("png", "jpeg")
)
TOUCH = f"touch {SENTINEL}".encode()
OPCODES = [
    *(bytes([code]) for code in b"(.0123]})NtleasubRoQ\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94\x97"),
    *(
        b"c" + function + b"\n(U" + bytes([len(argument)]) + argument + b"tR"
        for function, argument in [
            (b"os\nsystem", TOUCH), (b"posix\nsystem", TOUCH), (b"numpy\nload", b"x.npy"), (b"numpy\ndtype", b"O"),
            (b"numpy.core.multiarray\n_reconstruct", b"u1"), (b"_codecs\nencode", b"latin1"),
        ]
    ),
    b"M\x00\x0c", b"J\xff\xff\xff\x7f", b"\x8a\x08" + b"\x7f" * 8, b"I99\n", b"F1e999\n", b"U\x04data", b"U\x06labels",
    b"q\x00", b"h\x00", b"r\xff\xff\x00\x00", b"C\x03abc", b"cnumpy\nndarray\n", b"ios\nsystem\n", b"Pos\n",
    b"\x95" + b"\xff" * 8, b"\x8e" + b"\xff" * 8, b"B\xff\xff\xff\xff",
]  # fmt: skip


def pickles(content):
    """Programs of random opcodes, and `content` with opcodes exchanged, inserted and left out."""
    starts = [position for *_, position in pickletools.genops(content)]
    parts = [content[start:end] for start, end in zip(starts, [*starts[1:], len(content)], strict=True)]
    piece = st.sampled_from((*OPCODES, *parts))
    change = st.tuples(st.integers(0, len(parts) - 1), st.sampled_from(("set", "insert", "delete")), piece)

    def apply(changes):
        changed = list(parts)
        for where, how, piece in sorted(changes, key=lambda change: -change[0]):
            changed[where : where + (how != "insert")] = [] if how == "delete" else [piece]
        return b"".join(changed)

    programs = st.lists(st.sampled_from(OPCODES), max_size=40).map(lambda parts: b"\x80\x04" + b"".join(parts) + b".")
    return programs | st.lists(change, min_size=1, max_size=4).map(apply)


TAR_FIELDS = [(0, 100), (100, 8), (124, 12), (136, 12), (156, 1), (157, 100), (257, 8), (329, 8), (345, 155)]
TAR_HEADERS = [start for start in range(0, len(TAR), 512) if TAR[start + 257 : start + 262] == b"ustar"]
TAR_VALUES = st.binary(max_size=12) | st.sampled_from(
    [b"7" * 11, b"\x80" + b"\xff" * 11, b"\xff" * 12, b"-1", b"L", b"K", b"g", b"x", b"1", b"2", b"5", b"6", b"S",
     b"../../x", b"/etc/passwd", b"data_batch_1.bin", b"ustar  \0", b"a/" * 60]
)  # fmt: skip


def with_fields(changes):
    """The tar archive with fields of its headers changed and their checksums made to fit."""
    changed = bytearray(TAR)
    for start, (offset, size), value in changes:
        changed[start + offset : start + offset + size] = value[:size].ljust(size, b"\0")
        changed[start + 148 : start + 156] = b" " * 8
        changed[start + 148 : start + 156] = b"%06o\0 " % sum(changed[start : start + 512])
    return bytes(changed)


HEADERS = st.tuples(st.sampled_from(TAR_HEADERS), st.sampled_from(TAR_FIELDS), TAR_VALUES)
TARGETS = {
    "pickle": ("data_batch_1", pickles(PYTHON[2]["data_batch_1"]) | mutants(PYTHON[2]["data_batch_1"])),
    "pickle of protocol 5": ("data_batch_1", pickles(PYTHON[5]["data_batch_1"]) | mutants(PYTHON[5]["data_batch_1"])),
    "pickled class names": ("batches.meta", pickles(PYTHON[2]["batches.meta"])),
    "binary batch": ("data_batch_1.bin", mutants(BINARY["data_batch_1.bin"])),
    "class names": ("batches.meta.txt", mutants(BINARY["batches.meta.txt"])),
    "tar": ("a.tar", st.lists(HEADERS, min_size=1, max_size=3).map(with_fields) | mutants(TAR)),
    "gzip": ("a.tar.gz", mutants(gzip.compress(tar_bytes(PYTHON[2]), mtime=0))),
    "npz": ("a.npz", mutants(NPZ)),
    "png": ("train/class000/a.png", mutants(PNG)),
    "jpeg": ("train/class000/a.jpg", mutants(JPEG)),
}


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.filterwarnings("ignore::Warning")  # of Pillow and zipfile, which a command would print
def test_any_bytes(tmp_path, monkeypatch, target, count):
    monkeypatch.chdir(tmp_path)
    (name, strategy), place = TARGETS[target], tmp_path / "data"
    if name.startswith("train"):
        write_images(place, SMALL)
    else:
        write_folder(place, {} if name.startswith("a.") else PYTHON[2] if name in PYTHON[2] else BINARY)
    file = place / name
    path = file if name.startswith("a.") else place
    file.write_bytes(b"")
    before = sorted(tmp_path.rglob("*"))

    def body(content):
        file.write_bytes(content)
        tracemalloc.start()
        try:
            with contextlib.suppress(DataError):
                dataset, info = load_data(str(path))
                assert dataset.train_images.dtype == np.uint8 and dataset.train_labels.max() < len(info.classes)
            assert tracemalloc.get_traced_memory()[1] < 64 << 20
        finally:
            tracemalloc.stop()

    fuzz(count, st.binary(max_size=300) | strategy, body)
    assert sorted(tmp_path.rglob("*")) == before  # no sentinel, and nothing unpacked
