"""Writers of tiny data sets in every format that `fastcifar_jax.readers` reads, and what the tests ask of them."""

import gzip
import io
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from fastcifar_jax.data.load import DataError, load
from fastcifar_jax.types import Dataset

BATCHES = [f"data_batch_{i}" for i in range(1, 6)]


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


def parts(data, batches):
    """(file name, images, labels) of each batch."""
    images = np.array_split(data.train_images, len(batches) - 1)
    labels = np.array_split(data.train_labels, len(batches) - 1)
    return zip(batches, [*images, data.test_images], [*labels, data.test_labels], strict=True)


def python_files(data, /, classes=10, protocol=2, **changes):
    """The pickled release as {file name: bytes}; `changes` replace entries of every batch."""
    label = "labels" if classes == 10 else "fine_labels"
    batches = [*BATCHES, "test_batch"] if classes == 10 else ["train", "test"]
    files = {}
    for name, images, labels in parts(data, batches):
        batch = {b"batch_label": name.encode(), b"data": flat(images), label.encode(): labels.tolist()}
        batch |= {key.encode(): value for key, value in changes.items()}
        files[name] = pickle.dumps({k: v for k, v in batch.items() if v is not None}, protocol)
    key = b"label_names" if classes == 10 else b"fine_label_names"
    files["batches.meta" if classes == 10 else "meta"] = pickle.dumps(
        {key: [n.encode() for n in names(classes)]}, protocol
    )
    return files


def binary_files(data, classes=10):
    batches = [f"{b}.bin" for b in [*BATCHES, "test_batch"]] if classes == 10 else ["train.bin", "test.bin"]
    files = {}
    for name, images, labels in parts(data, batches):
        columns = [labels[:, None]] if classes == 10 else [labels[:, None] // 5, labels[:, None]]
        files[name] = np.concatenate([*columns, flat(images)], axis=1).astype(np.uint8).tobytes()
    text = ("\n".join(names(classes)) + "\n\n").encode()
    if classes == 10:
        return files | {"batches.meta.txt": text}
    return files | {"fine_label_names.txt": text, "coarse_label_names.txt": "\n".join(names(20)).encode()}


FOLDERS = {
    ("python", 10): "cifar-10-batches-py",
    ("binary", 10): "cifar-10-batches-bin",
    ("python", 100): "cifar-100-python",
    ("binary", 100): "cifar-100-binary",
}


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


def write_npz(path, data, column=False, **changes):
    """A Keras-style file (a path or a buffer); `changes` replace arrays, None leaves one out."""
    labels = [y[:, None] if column else y for y in (data.train_labels, data.test_labels)]
    arrays = dict(x_train=data.train_images, y_train=labels[0], x_test=data.test_images, y_test=labels[1]) | changes
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


def write_images(folder, data, classes=10):
    for split in ("train", "test"):
        images, labels = getattr(data, f"{split}_images"), getattr(data, f"{split}_labels")
        for name in names(classes):
            (folder / split / name).mkdir(parents=True)
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            Image.fromarray(image).save(folder / split / names(classes)[label] / f"{i:03d}.png")
    return folder


def python2_pickle(images, labels):
    """A batch as Python 2 and NumPy 1 wrote the released files: protocol 2, text and bytes as BINSTRING."""

    def text(value):
        return b"U" + bytes([len(value)]) + value

    raw = flat(images).tobytes()
    shape = b"K" + bytes([len(images)]) + b"M\x00\x0c\x86"
    dtype = b"cnumpy\ndtype\nq\x07" + text(b"u1") + b"K\x00K\x01\x87q\x08Rq\x09(K\x03" + text(b"|")
    dtype += b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\nq\x04cnumpy\nndarray\nq\x05K\x00\x85" + text(b"b") + b"\x87q\x06R"
    array += b"(K\x01" + shape + dtype + b"\x89T" + len(raw).to_bytes(4, "little") + raw + b"tb"
    ints = b"](" + b"".join(b"K" + bytes([y]) for y in labels) + b"e"
    return b"\x80\x02}q\x01(" + text(b"labels") + ints + text(b"data") + array + b"u."


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
