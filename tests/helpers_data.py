"""Writers of tiny data sets in every format, and the check that a path is refused."""

import gzip
import io
import pickle
import struct
import tarfile
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from fastcifar_jax.data.load import DataError, load_data
from fastcifar_jax.types import Dataset

BATCHES = [f"data_batch_{i}" for i in range(1, 6)]
FOLDERS = {
    ("python", 10): "cifar-10-batches-py",
    ("binary", 10): "cifar-10-batches-bin",
    ("python", 100): "cifar-100-python",
    ("binary", 100): "cifar-100-binary",
}
MAX_PEAK = 24 << 20  # bytes that may be allocated before a file is refused


def tiny(classes=10, train=20, test=10):
    """Random images; 20 divide into the five batches of CIFAR-10."""
    rng = np.random.default_rng(classes)
    images = rng.integers(0, 256, (train + test, 32, 32, 3), dtype=np.uint8)
    labels = rng.integers(0, classes, train + test, dtype=np.int32)
    labels[-1] = classes - 1
    return Dataset(images[:train], labels[:train], images[train:], labels[train:])


def names(classes):
    return [f"class{i:03d}" for i in range(classes)]


def flat(images):
    """Rows of a CIFAR file: channel, then row, then column; written with indices instead of a transposition."""
    return np.concatenate([images[..., channel].reshape(len(images), 1024) for channel in range(3)], axis=1)


def batches_of(data, files):
    """(file name, images, labels) of each batch."""
    images = np.array_split(data.train_images, len(files) - 1)
    labels = np.array_split(data.train_labels, len(files) - 1)
    return zip(files, [*images, data.test_images], [*labels, data.test_labels], strict=True)


def python_files(data, /, classes=10, protocol=2, **changes):
    """The pickled release as {file name: bytes}; `changes` replace entries of every batch."""
    label = "labels" if classes == 10 else "fine_labels"
    files = {}
    for name, images, labels in batches_of(data, [*BATCHES, "test_batch"] if classes == 10 else ["train", "test"]):
        batch = {b"batch_label": name.encode(), b"data": flat(images), label.encode(): labels.tolist()}
        batch |= {key.encode(): value for key, value in changes.items()}
        files[name] = pickle.dumps({key: value for key, value in batch.items() if value is not None}, protocol)
    file, key = ("batches.meta", b"label_names") if classes == 10 else ("meta", b"fine_label_names")
    return files | {file: pickle.dumps({key: [name.encode() for name in names(classes)]}, protocol)}


def binary_files(data, classes=10):
    files = {}
    batches = [f"{name}.bin" for name in ([*BATCHES, "test_batch"] if classes == 10 else ["train", "test"])]
    for name, images, labels in batches_of(data, batches):
        columns = [labels[:, None]] if classes == 10 else [labels[:, None] // 5, labels[:, None]]
        files[name] = np.concatenate([*columns, flat(images)], axis=1).astype(np.uint8).tobytes()
    text = ("\n".join(names(classes)) + "\n\n").encode()
    if classes == 10:
        return files | {"batches.meta.txt": text}
    return files | {"fine_label_names.txt": text, "coarse_label_names.txt": "\n".join(names(20)).encode()}


def python2_pickle(images, labels):
    """A batch as Python 2 and NumPy 1 wrote the published files: protocol 2, text and bytes as BINSTRING."""
    text = lambda value: b"U" + bytes([len(value)]) + value
    raw = flat(images).tobytes()
    shape = b"K" + bytes([len(images)]) + b"M\x00\x0c\x86"
    dtype = b"cnumpy\ndtype\nq\x07" + text(b"u1") + b"K\x00K\x01\x87q\x08Rq\x09(K\x03" + text(b"|")
    dtype += b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\nq\x04cnumpy\nndarray\nq\x05K\x00\x85" + text(b"b") + b"\x87q\x06R"
    array += b"(K\x01" + shape + dtype + b"\x89T" + len(raw).to_bytes(4, "little") + raw + b"tb"
    ints = b"](" + b"".join(b"K" + bytes([y]) for y in labels) + b"e"
    return b"\x80\x02}q\x01(" + text(b"labels") + ints + text(b"data") + array + b"u."


def write_folder(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def tar_bytes(files, folder="cifar-10-batches-py", extra=()):
    """A tar archive of `files`, then of the prepared TarInfo objects `extra`, without contents."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        head = tarfile.TarInfo(folder)
        head.type = tarfile.DIRTYPE
        archive.addfile(head)
        for name, data in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        for member in extra:
            archive.fileobj.write(member.tobuf())
            archive.offset += 512
    return out.getvalue()


def write_tar(path, files, folder="cifar-10-batches-py", extra=()):
    path.write_bytes(gzip.compress(tar_bytes(files, folder, extra), mtime=0))
    return path


def write_npz(path, data, column=False, save=np.savez, **changes):
    """A Keras-style file (a path or a buffer); `changes` replace arrays, None leaves one out."""
    labels = [y[:, None] if column else y for y in (data.train_labels, data.test_labels)]
    arrays = dict(x_train=data.train_images, y_train=labels[0], x_test=data.test_images, y_test=labels[1]) | changes
    save(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


def saved(write):
    """The bytes that `write` puts into a file object."""
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


def png(size, mode="RGB"):
    return saved(lambda buffer: Image.new(mode, size).save(buffer, "png"))


def _text_bomb():
    """A PNG file whose text takes 32 MiB; with the right lengths and checksums."""
    head = struct.pack(">IIBBBBB", 32, 32, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"zTXt", b"a\0\0" + zlib.compress(bytes(32 << 20))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


BAD_IMAGES = [  # (content, what the error says)
    (b"", "cannot be read"),
    (b"GIF89a" + bytes(50), "cannot be read"),
    (png((32, 32))[:40], "cannot be read"),
    (png((32, 32))[:-30], "cannot be read"),
    (png((20_000, 20_000), "1"), "DecompressionBomb"),
    (_text_bomb(), "cannot be read"),
]


def write_images(folder, data, classes=10):
    for split in ("train", "test"):
        images, labels = getattr(data, f"{split}_images"), getattr(data, f"{split}_labels")
        for name in names(classes):
            (folder / split / name).mkdir(parents=True)
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            Image.fromarray(image).save(folder / split / names(classes)[label] / f"{i:03d}.png")
    return folder


TINY = {10: tiny(10), 100: tiny(100)}
SMALL = tiny(10, 5, 1)
FILES = {"python": python_files, "binary": binary_files}


def assert_same(got, expected):
    for a, b, name in zip(got, expected, expected._fields, strict=True):
        assert a.dtype == (np.uint8 if "images" in name else np.int32)
        assert a.flags.c_contiguous
        np.testing.assert_array_equal(a, b, err_msg=name)


def refusal(path):
    """The message of the DataError that reading `path` ends in, after few allocations."""
    tracemalloc.start()
    try:
        with pytest.raises(DataError) as caught:
            load_data(str(path))
        assert tracemalloc.get_traced_memory()[1] < MAX_PEAK
    finally:
        tracemalloc.stop()
    return str(caught.value)
