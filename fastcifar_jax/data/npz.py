"""Keras-style npz files: x_train, y_train, x_test and y_test."""

import math
import zipfile
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from fastcifar_jax.data.checks import DataError, check_labels
from fastcifar_jax.types import Dataset

MAX_IMAGES = 8 << 30  # bytes of an array of images; ImageNet at 32x32 has 3.9 GB
MAX_LABELS = 64 << 20  # bytes of an array of labels; ImageNet's, as int64, have 10 MB
MAX_CLASSES = 1 << 16


def read_npz(path: Path) -> tuple[Dataset, tuple[str, ...]]:
    """Both splits of an npz file, and its classes, which are numbered."""
    with zipfile.ZipFile(path) as archive:
        arrays = {key: _read_array(archive, key, path) for key in ("x_train", "y_train", "x_test", "y_test")}
    for split in ("train", "test"):
        images, key = arrays[f"x_{split}"], f"y_{split}"
        arrays[key] = check_labels(arrays[key], len(images), MAX_CLASSES, f"{path}: {key}")
    classes = 1 + max(arrays["y_train"].max(), arrays["y_test"].max())
    return Dataset(*arrays.values()), tuple(str(label) for label in range(classes))


def _read_array(archive, key, path):
    """The array `key`, whose header is compared with the file before anything is allocated."""
    name, found = f"{path}: {key}", archive.namelist()
    if f"{key}.npy" not in found:
        raise DataError(f"{name} is missing from {found[:9]!s:.200}; write x_train, y_train, x_test and y_test")
    member = archive.getinfo(f"{key}.npy")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        # zipfile bounds what it unpacks at once for these two only; 4 kB of bzip2 can hold gigabytes.
        raise DataError(f"{name} is compressed by method {member.compress_type}; write it by np.savez_compressed")
    with archive.open(member) as file:
        version = npy.read_magic(file)
        if version != (1, 0):  # the header of later versions may have gigabytes
            raise DataError(f"{name} has a header of version {version}; expected (1, 0): write it by np.savez")
        shape, _, dtype = npy.read_array_header_1_0(file)
        if key[0] == "x" and (dtype != np.uint8 or len(shape) != 4 or shape[1:] != (32, 32, 3) or shape[0] < 1):
            raise DataError(f"{name} is {dtype} {shape!s:.80}; expected uint8 (n, 32, 32, 3); convert it")
        if key[0] == "y" and (dtype.kind not in "iu" or len(shape) not in (1, 2)):
            raise DataError(f"{name} is {dtype} {shape!s:.80}; expected integer labels (n,); convert it")
        size, held = math.prod(shape) * dtype.itemsize, member.file_size - file.tell()
        max_bytes = MAX_IMAGES if key[0] == "x" else MAX_LABELS
        if size != held or size > max_bytes:
            limit = f"expected the same, and at most {max_bytes:,}; download or write it again"
            raise DataError(f"{name} has a header of {size:,} bytes and holds {held:,}; {limit}")
    with archive.open(member) as file:
        return np.ascontiguousarray(npy.read_array(file, allow_pickle=False))
