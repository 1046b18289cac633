"""Files on disk -> uint8 NumPy arrays: the CIFAR releases, Keras-style npz files and folders of images.

Every file is treated as untrusted. Nothing in it is executed or unpacked onto the disk, no claim of a header is
believed before it is compared with the bytes that are there, and whatever is wrong ends as one `DataError`.
"""

import contextlib
import gzip
import hashlib
import io
import math
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple, cast

import numpy as np

from fastcifar_jax.data.restricted_pickle import text_of, unpickle
from fastcifar_jax.types import Dataset

MAX_BATCH = 512 << 20  # bytes of one CIFAR batch file; the largest real one, of CIFAR-100, has 155 MB
MAX_ARCHIVE = 1 << 30  # bytes of a whole archive, unpacked; the real ones have 180 MB
MAX_MEMBERS = 1000  # files in an archive; the real ones hold ten
MAX_NAMES = 1 << 16  # bytes of the file of class names; CIFAR-100's have 1 kB
MAX_ARRAY = 8 << 30  # bytes of one array of an npz file; ImageNet at 32x32 has 3.9 GB
MAX_LABELS = 64 << 20  # bytes of the labels in an npz file; ImageNet's, as int64, have 10 MB
MAX_IMAGE = 1 << 20  # bytes of one image file; 32x32 pixels uncompressed are 3 kB
MAX_CLASSES = 1 << 16
MAX_PIXELS = 1 << 25  # of an image that is resized; a camera's has 12 to 24 million

PIXELS = 32 * 32 * 3
KINDS = (
    "a CIFAR-10 or CIFAR-100 release (folder or .tar.gz, Python or binary version), a Keras-style .npz file, "
    "or a folder with train/CLASS/*.png and test/CLASS/*.png"
)


class DataError(ValueError):
    """The data asked for cannot be had: the message names the file, its fault and what to do."""


def read(path: Path) -> tuple[Dataset, tuple[str, ...]]:
    """Reads both splits of whatever kind of data lies at `path`.

    Returns:
      NumPy arrays, images uint8 `[n, 32, 32, 3]` and labels int32 `[n]`; and the class names, in the labels' order.

    Raises:
      DataError: there is nothing at `path`, it is of no known kind, or it is damaged.
    """
    with as_data_error(path):
        if path.is_dir():
            return _read_folder(path)
        if not path.is_file():
            raise DataError(f"there is no file or folder {path}; give the path of {KINDS}")
        if path.suffix == ".npz":
            return _read_npz(path)
        if path.name.endswith((".tar.gz", ".tgz", ".tar")):
            return _read_tar(path)
        raise DataError(f"{path} is of no known kind; give {KINDS}")


@contextlib.contextmanager
def as_data_error(name):
    """Turns every error of the parsers into a DataError about the file `name`."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # on bytes from elsewhere a parser may raise anything, and it is always the file's fault
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{name} cannot be read ({type(error).__name__}: {reason}); fetch or write it again") from error


def checked_labels(labels, count: int, classes: int, name: str) -> np.ndarray:
    """Labels as int32 `[count]`, after checking that they are `count` integers from 0 to `classes - 1`."""
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iu":
        raise DataError(f"{name} holds labels of type {labels.dtype}; expected integers")
    if labels.shape == (count, 1):  # Keras writes a column
        labels = labels[:, 0]
    if labels.shape != (count,):
        raise DataError(f"{name} holds labels of shape {labels.shape} for {count} images; expected one label an image")
    if labels.min() < 0 or labels.max() >= classes:
        wrong = labels.min() if labels.min() < 0 else labels.max()
        raise DataError(f"{name} holds the label {wrong}; expected 0 to {classes - 1}")
    return labels.astype(np.int32)


# The CIFAR releases: five batches (CIFAR-10) or one (CIFAR-100), one image a row, channel by channel.


class _Layout(NamedTuple):
    folder: str
    train: tuple[str, ...]
    test: str
    names: str  # the file of the class names
    classes: int
    label: str = ""  # of a pickled release: the key of the labels
    name_key: str = ""  # and the key of the class names
    columns: int = 0  # labels before each image of a binary batch, the last one being the class


_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
_BINARY = tuple(f"{name}.bin" for name in _BATCHES)
LAYOUTS = (
    _Layout("cifar-10-batches-py", _BATCHES, "test_batch", "batches.meta", 10, "labels", "label_names"),
    _Layout("cifar-10-batches-bin", _BINARY, "test_batch.bin", "batches.meta.txt", 10, columns=1),
    _Layout("cifar-100-python", ("train",), "test", "meta", 100, "fine_labels", "fine_label_names"),
    _Layout("cifar-100-binary", ("train.bin",), "test.bin", "fine_label_names.txt", 100, columns=2),
)


def _read_folder(path):
    found = [
        (layout, folder)
        for layout in LAYOUTS
        for folder in (path, path / layout.folder)
        if any((folder / name).is_file() for name in (*layout.train, layout.test))
    ]
    if len(found) > 1:
        raise DataError(f"{path} holds more than one data set; give one of {', '.join(str(f) for _, f in found)}")
    if not found:
        if (path / "train").is_dir():
            return _read_images(path)
        raise DataError(f"the folder {path} holds no data of a known kind; give {KINDS}")
    layout, folder = found[0]
    present = {file.name for file in folder.iterdir() if file.is_file()}
    return _read_batches(layout, present, lambda name: bounded_bytes(folder / name, MAX_BATCH), folder)


def _read_tar(path):
    with open(path, "rb") as file:
        members = tar_members(file, path)
    found = [k for k in LAYOUTS if any(name in members for name in (*k.train, k.test))]
    if len(found) != 1:
        raise DataError(f"{path} holds no single CIFAR release, but {sorted(members)[:9]}; give {KINDS}")
    return _read_batches(found[0], set(members), members.pop, path)


def tar_members(file, name) -> dict[str, bytes]:
    """The contents of a CIFAR archive, compressed or not, by file name without folder; nothing touches the disk."""
    members = {}
    with as_data_error(name):
        compressed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        stream = _Bounded(gzip.GzipFile(fileobj=file) if compressed else file, name)
        with tarfile.open(fileobj=cast(IO[bytes], stream), mode="r|") as archive:
            for count, member in enumerate(archive):
                path = PurePosixPath(member.name)
                if count >= MAX_MEMBERS:
                    raise DataError(f"{name} holds more than {MAX_MEMBERS} files; a CIFAR archive holds about ten")
                if path.is_absolute() or ".." in path.parts:
                    raise DataError(f"{name} holds {path}, outside its folder; a CIFAR archive does not")
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    raise DataError(f"{name}: {path} is a link or no plain file; fetch the archive again")
                if member.size > MAX_BATCH:
                    raise DataError(f"{name}: {path} claims {member.size} bytes; at most {MAX_BATCH} are read")
                if path.name in members:
                    raise DataError(f"{name} holds {path.name} twice; fetch the archive again")
                members[path.name] = cast(IO[bytes], archive.extractfile(member)).read()
    return members


class _Bounded:
    """A stream of at most `MAX_ARCHIVE` bytes: a small gzip file can unpack into a thousand times its size."""

    def __init__(self, stream, name):
        self.stream, self.name, self.left = stream, name, MAX_ARCHIVE

    def read(self, size):
        data = self.stream.read(size)
        self.left -= len(data)
        if self.left < 0:
            raise DataError(f"{self.name} unpacks into more than {MAX_ARCHIVE} bytes; a CIFAR archive does not")
        return data


def _read_batches(layout, present, take: Callable[[str], bytes], where):
    """Both splits of a CIFAR release whose file `name` holds the bytes `take(name)`; each is taken once."""
    missing = [name for name in (*layout.train, layout.test) if name not in present]
    if missing:
        raise DataError(f"{where} lacks {', '.join(missing)}; fetch the whole release again")
    classes = tuple(str(label) for label in range(layout.classes))
    if layout.names in present:
        with as_data_error(f"{where}: {layout.names}"):
            classes = _class_names(take(layout.names), layout, f"{where}: {layout.names}")
    digests: dict[str, str] = {}

    def split(names):
        parts = []
        for name in names:
            with as_data_error(f"{where}: {name}"):
                data = take(name)
                digest = hashlib.sha256(data).digest()
                if digest in digests:
                    raise DataError(f"{where}: {name} is a copy of {digests[digest]}; fetch the release again")
                digests[digest] = name
                parts.append(_decode(data, layout, f"{where}: {name}"))
                counts = len(parts[-1][0]), len(parts[0][0])
                if counts[0] != counts[1]:  # how a file cut between two images shows
                    raise DataError(f"{where}: {name} holds {counts[0]} images, others {counts[1]}; fetch it again")
        images = np.empty((sum(len(rows) for rows, _ in parts), 32, 32, 3), np.uint8)
        start = 0
        for rows, _ in parts:
            images[start : start + len(rows)] = rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            start += len(rows)
        return images, np.concatenate([labels for _, labels in parts])

    return Dataset(*split(layout.train), *split((layout.test,))), classes


def _decode(data, layout, name):
    """One batch: uint8 rows `[n, 3072]`, channel by channel, and int32 labels `[n]`."""
    if not data:
        raise DataError(f"{name} is empty; fetch it again")
    if layout.columns:
        labels, rows = binary_rows(data, layout.columns, name)
        return rows, checked_labels(labels[:, -1], len(rows), layout.classes, name)
    batch = unpickle(data)
    if "data" not in batch or layout.label not in batch:
        raise DataError(f"{name} holds {list(batch)[:9]!s:.200}; expected 'data' and '{layout.label}'; fetch it again")
    rows, labels = batch["data"], batch[layout.label]
    if not isinstance(rows, np.ndarray) or rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != PIXELS:
        held = f"{rows.dtype} {rows.shape}" if isinstance(rows, np.ndarray) else type(rows).__name__
        raise DataError(f"{name} holds images as {held}; expected a uint8 array of n rows of {PIXELS}")
    if not len(rows):
        raise DataError(f"{name} holds no images; fetch it again")
    if not isinstance(labels, np.ndarray) and not (isinstance(labels, list) and all(type(y) is int for y in labels)):
        raise DataError(f"{name} holds labels that are no list of integers; fetch it again")
    return rows, checked_labels(labels, len(rows), layout.classes, name)


def binary_rows(data: bytes, columns: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The labels, uint8 `[n, columns]`, and rows, uint8 `[n, 3072]`, of a binary batch; views of `data`."""
    row = columns + PIXELS
    if not data or len(data) % row:
        raise DataError(f"{name} has {len(data)} bytes; expected a multiple of {row}; fetch it again")
    rows = np.frombuffer(data, np.uint8).reshape(-1, row)
    return rows[:, :columns], rows[:, columns:]


def _class_names(data, layout, name):
    if len(data) > MAX_NAMES:
        raise DataError(f"{name} has {len(data):,} bytes; at most {MAX_NAMES:,} are read; fetch it again")
    if layout.columns:
        names = data.decode("latin1").split()
    else:
        names = unpickle(data).get(layout.name_key)
        names = [text_of(n) for n in names] if isinstance(names, list) else []
    if len(names) != layout.classes or not all(isinstance(n, str) for n in names):
        raise DataError(f"{name} names {len(names)} classes; expected {layout.classes}; fetch it again")
    return tuple(names)


def bounded_bytes(path: Path, limit: int) -> bytes:
    """The bytes of a file.

    Raises:
      DataError: it is no plain file, or has more than `limit` bytes.
    """
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise DataError(f"{path} is a folder or no plain file; remove it")
    if path.stat().st_size > limit:
        raise DataError(f"{path} has more than {limit} bytes, the most that is read")
    return path.read_bytes()


# Keras-style npz files.


def _read_npz(path):
    with zipfile.ZipFile(path) as archive:
        arrays = {key: _npz_array(archive, key, path) for key in ("x_train", "y_train", "x_test", "y_test")}
    for split in ("train", "test"):
        images, key = arrays[f"x_{split}"], f"y_{split}"
        arrays[key] = checked_labels(arrays[key], len(images), MAX_CLASSES, f"{path}: {key}")
    classes = 1 + max(arrays["y_train"].max(), arrays["y_test"].max())
    return Dataset(*arrays.values()), tuple(str(label) for label in range(classes))


def _npz_array(archive, key, path):
    """The array `key`; its header is compared with the file before anything is allocated."""
    name = f"{path}: {key}"
    if f"{key}.npy" not in archive.namelist():
        raise DataError(f"{name} is missing, found {archive.namelist()[:9]}; write x_train, y_train, x_test and y_test")
    member = archive.getinfo(f"{key}.npy")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        # Of these alone zipfile unpacks no more than was asked for; 4 kB of bzip2 can hold gigabytes.
        raise DataError(f"{name} is packed by method {member.compress_type}; write it by np.savez or savez_compressed")
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        if version != (1, 0):  # later ones may carry headers of gigabytes
            raise DataError(f"{name} has an array header of version {version}; expected 1.0, as np.savez writes it")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        if key[0] == "x" and (dtype != np.uint8 or len(shape) != 4 or shape[1:] != (32, 32, 3) or shape[0] < 1):
            raise DataError(f"{name} is {dtype} {shape!s:.80}; expected uint8 images (n, 32, 32, 3)")
        if key[0] == "y" and (dtype.kind not in "iu" or len(shape) not in (1, 2)):
            raise DataError(f"{name} is {dtype} {shape!s:.80}; expected integer labels (n,)")
        size, most = math.prod(shape) * dtype.itemsize, MAX_ARRAY if key[0] == "x" else MAX_LABELS
        if size != member.file_size - file.tell() or size > most:
            raise DataError(f"{name} claims {size} bytes of {member.file_size}; at most {most} are read")
        array = np.empty(shape[::-1] if fortran else shape, dtype)
        view = memoryview(array.reshape(-1)).cast("B")
        done = 0
        while done < size:
            got = file.readinto(view[done : done + MAX_IMAGE])
            if not got:
                raise DataError(f"{name} ends after {done} of {size} bytes; fetch or write it again")
            done += got
    return np.ascontiguousarray(array.T) if fortran else array


# Folders of images.


def _read_images(path):
    if not (path / "test").is_dir():
        raise DataError(f"{path} has a folder train, but no folder test; expected test/CLASS/*.png beside it")
    classes = tuple(sorted(p.name for p in (path / "train").iterdir() if p.is_dir()))
    unknown = sorted({p.name for p in (path / "test").iterdir() if p.is_dir()} - set(classes))
    if unknown:
        raise DataError(f"{path / 'test'} holds the classes {unknown[:9]}, but train does not; add or remove them")
    arrays = []
    for split in ("train", "test"):
        files = [
            (file, label)
            for label, name in enumerate(classes)
            for file in sorted((path / split / name).glob("*"))
            if file.suffix.lower() in (".png", ".jpg", ".jpeg")
        ]
        if not files:
            raise DataError(f"{path / split} holds no images; expected {split}/CLASS/*.png, *.jpg or *.jpeg")
        # Shuffled, as the released files are: the first n images of a sorted folder would be of one class.
        order = np.random.default_rng(0).permutation(len(files))
        images = np.empty((len(files), 32, 32, 3), np.uint8)
        for row, i in zip(images, order, strict=True):
            with as_data_error(files[i][0]):
                row[...] = decode_image(bounded_bytes(files[i][0], MAX_IMAGE), files[i][0])
        arrays += [images, np.array([files[i][1] for i in order], np.int32)]
    return Dataset(*arrays), classes


def decode_image(
    data: bytes, name, width: int = 32, height: int = 32, resize: bool = False, advice: str = "resize the images first"
) -> np.ndarray:
    """A PNG or JPEG file as uint8 `[height, width, 3]`.

    Args:
      data: the file's bytes, which are treated as untrusted.
      name: of the file, for errors.
      width: of the result, in pixels.
      height: of the result, in pixels.
      resize: cut the centre out of an image of another size, and scale it; turn a photograph as its camera was held.
      advice: what to do about an image of another size.

    Raises:
      DataError: an image of another size, or one with too many pixels.
      Exception: of any kind, from the decoder: call it within `as_data_error`.
    """
    from PIL import Image, ImageOps  # only this kind of data needs pillow

    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
        # Checked before a pixel is decoded, so no image can unpack into gigabytes.
        if not resize and image.size != (width, height):
            size = f"{image.width}x{image.height}"
            raise DataError(f"{name} has {size} pixels; expected {width}x{height}: {advice}")
        if image.width * image.height > MAX_PIXELS:
            raise DataError(f"{name} has {image.width}x{image.height} pixels; at most {MAX_PIXELS} are read")
        if not resize:
            return np.asarray(image.convert("RGB"))
        turned = ImageOps.exif_transpose(image).convert("RGB")
        return np.asarray(ImageOps.fit(turned, (width, height), Image.Resampling.BICUBIC))
