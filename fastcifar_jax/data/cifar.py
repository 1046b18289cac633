"""The CIFAR releases, as a folder or a tar archive, in the Python or the binary version.

Each image is a row of 3072 bytes, channel by channel. See https://www.cs.toronto.edu/~kriz/cifar.html.
"""

import hashlib
import io
import tarfile
import zlib
from collections.abc import Callable, Collection
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple, cast

import numpy as np

from fastcifar_jax.data.checks import KINDS, DataError, as_data_error, check_labels, read_bounded
from fastcifar_jax.data.restricted_pickle import text_of, unpickle
from fastcifar_jax.types import Dataset

MAX_BATCH = 512 << 20  # bytes of one batch file; the largest, of CIFAR-100, has 155 MB
MAX_ARCHIVE = 512 << 20  # bytes of an archive, unpacked; the published ones have 180 MB
MAX_MEMBERS = 1000  # files in an archive; the published ones hold ten
MAX_NAMES = 1 << 16  # bytes of the file with the class names; CIFAR-100's has 1 kB
PIXELS = 32 * 32 * 3


class Release(NamedTuple):
    """The files of one published release."""

    folder: str
    train: tuple[str, ...]
    test: str
    names: str  # file with the class names
    classes: int
    label: str = ""  # Python version: key of the labels
    name_key: str = ""  # Python version: key of the class names
    label_columns: int = 0  # binary version: labels before each image, the last one of which is the class


_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
_BINARY = tuple(f"{name}.bin" for name in _BATCHES)
RELEASES = (
    Release("cifar-10-batches-py", _BATCHES, "test_batch", "batches.meta", 10, "labels", "label_names"),
    Release("cifar-10-batches-bin", _BINARY, "test_batch.bin", "batches.meta.txt", 10, label_columns=1),
    Release("cifar-100-python", ("train",), "test", "meta", 100, "fine_labels", "fine_label_names"),
    Release("cifar-100-binary", ("train.bin",), "test.bin", "fine_label_names.txt", 100, label_columns=2),
)


def read_cifar_folder(path: Path) -> tuple[Dataset, tuple[str, ...]] | None:
    """Both splits and the class names of the release in `path` or its subfolder; None if there is none."""
    found = [
        (release, folder)
        for release in RELEASES
        for folder in (path, path / release.folder)
        if any((folder / name).is_file() for name in (*release.train, release.test))
    ]
    if len(found) > 1:
        raise DataError(f"{path} holds more than one data set; give one of {', '.join(str(f) for _, f in found)}")
    if not found:
        return None
    release, folder = found[0]
    present = {file.name for file in folder.iterdir() if file.is_file()}
    return _read_release(release, present, lambda name: read_bounded(folder / name, MAX_BATCH), folder)


def read_cifar_archive(path: Path) -> tuple[Dataset, tuple[str, ...]]:
    """Both splits and the class names of the release in a tar archive, compressed or not."""
    members = read_tar(read_bounded(path, MAX_ARCHIVE), path)
    found = [release for release in RELEASES if any(name in members for name in (*release.train, release.test))]
    if len(found) != 1:
        raise DataError(f"{path} holds {sorted(members)[:9]!s:.200}; expected one CIFAR release; give {KINDS}")
    return _read_release(found[0], set(members), members.pop, path)


def read_tar(data: bytes, name: object) -> dict[str, bytes]:
    """The files of a CIFAR archive, compressed or not, by name without folder; nothing is written to disk."""
    members = {}
    with as_data_error(name):
        if data.startswith(b"\x1f\x8b"):
            gunzip = zlib.decompressobj(wbits=31)
            data = gunzip.decompress(data, MAX_ARCHIVE)
            if not gunzip.eof:
                raise DataError(f"{name} is cut off or unpacks into over {MAX_ARCHIVE:,} bytes; download it again")
        # As a stream, in which a negative size cannot lead back to an earlier member.
        with tarfile.open(fileobj=io.BytesIO(data), mode="r|") as archive:
            for count, member in enumerate(archive):
                file = PurePosixPath(member.name).name
                if count >= MAX_MEMBERS:
                    raise DataError(f"{name} holds more than {MAX_MEMBERS} files; download it again")
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse() or file in members:
                    raise DataError(f"{name}: {file} is not a regular file, or is there twice; download it again")
                members[file] = cast(IO[bytes], archive.extractfile(member)).read()
    return members


def split_binary(data: bytes, label_columns: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The labels, uint8 `[n, label_columns]`, and rows, uint8 `[n, 3072]`, of a binary batch; views of `data`."""
    size = label_columns + PIXELS
    if len(data) % size:
        raise DataError(f"{name} has {len(data):,} bytes; expected a multiple of {size}; download it again")
    rows = np.frombuffer(data, np.uint8).reshape(-1, size)
    return rows[:, :label_columns], rows[:, label_columns:]


def _read_release(release: Release, present: Collection[str], read: Callable[[str], bytes], where: object):
    """Both splits and the class names of a release whose file `name` holds `read(name)`; each is read once."""
    missing = [name for name in (*release.train, release.test) if name not in present]
    if missing:
        raise DataError(f"{where} lacks {', '.join(missing)}; download the whole release again")
    classes = tuple(str(label) for label in range(release.classes))
    if release.names in present:
        with as_data_error(f"{where}: {release.names}"):
            classes = _class_names(read(release.names), release, f"{where}: {release.names}")
    digests: dict[bytes, str] = {}

    def read_split(names):
        batches = []
        for file in names:
            name = f"{where}: {file}"
            with as_data_error(name):
                data = read(file)
                copied = digests.setdefault(hashlib.sha256(data).digest(), file)
                if copied != file:
                    raise DataError(f"{name} is a copy of {copied}; download the release again")
                batches.append(_decode_batch(data, release, name))
            count, expected = len(batches[-1][0]), len(batches[0][0])
            if count != expected:  # a file that was cut between two images
                raise DataError(f"{name} holds {count} images; expected {expected}, as in {names[0]}; replace it")
        images = np.empty((expected * len(names), 32, 32, 3), np.uint8)
        np.concatenate([rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1) for rows, _ in batches], out=images)
        return images, np.concatenate([labels for _, labels in batches])

    return Dataset(*read_split(release.train), *read_split((release.test,))), classes


def _decode_batch(data, release, name):
    """One batch: rows, uint8 `[n, 3072]`, and labels, int32 `[n]`."""
    if release.label_columns:
        columns, rows = split_binary(data, release.label_columns, name)
        labels = columns[:, -1]
    else:
        batch = unpickle(data)
        if "data" not in batch or release.label not in batch:
            keys = [key[:20] for key in batch][:9]
            raise DataError(f"{name} holds {keys}; expected 'data' and '{release.label}'; download it again")
        rows, labels = batch["data"], batch[release.label]
        if not isinstance(rows, np.ndarray) or rows.dtype != np.uint8 or rows.shape[1:] != (PIXELS,):
            held = f"{rows.dtype} {rows.shape}" if isinstance(rows, np.ndarray) else type(rows).__name__
            raise DataError(f"{name} holds images as {held}; expected uint8 (n, {PIXELS}); download it again")
        is_list = isinstance(labels, list) and all(type(label) is int for label in labels)
        if not is_list and not isinstance(labels, np.ndarray):
            raise DataError(f"{name} holds labels that are not integers; download it again")
    if not len(rows):
        raise DataError(f"{name} holds no images; download it again")
    return rows, check_labels(labels, len(rows), release.classes, name)


def _class_names(data, release, name):
    if len(data) > MAX_NAMES:
        raise DataError(f"{name} has {len(data):,} bytes; expected at most {MAX_NAMES:,}; download it again")
    found = data.decode("latin1").split() if release.label_columns else unpickle(data).get(release.name_key)
    if not isinstance(found, list) or len(found) != release.classes:
        raise DataError(f"{name} does not hold {release.classes} class names; download it again")
    return tuple(text_of(entry) for entry in found)
