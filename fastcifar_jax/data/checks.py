"""The error that every reader raises, and the checks that the readers share.

Every file is treated as untrusted. Nothing in it is executed or unpacked onto the disk, a size in a header is compared
with the bytes that are there before memory is allocated for it, and every fault is reported as a `DataError`.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

NAMES = ("cifar10", "cifar100", "digits")
KINDS = (
    "a CIFAR-10 or CIFAR-100 release (folder or .tar.gz, Python or binary version), a Keras-style .npz file, "
    "or a folder with train/CLASS/*.png and test/CLASS/*.png"
)


class DataError(ValueError):
    """Data that cannot be obtained or read: the message names the file, what was expected and what to do."""


@contextlib.contextmanager
def as_data_error(name: object) -> Iterator[None]:
    """Turns every error of a parser into a DataError about the file `name`."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # on untrusted bytes a parser may raise anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise DataError(f"{name} cannot be read ({reason}); it may be damaged: download or write it again") from error


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """The bytes of a regular file that has at most `max_bytes`."""
    if path.exists() and not path.is_file():  # reading a pipe would block
        raise DataError(f"{path} is not a regular file; remove it")
    size = path.stat().st_size
    if size > max_bytes:
        raise DataError(f"{path} has {size:,} bytes; expected at most {max_bytes:,}; download or write it again")
    return path.read_bytes()


def check_labels(labels: object, count: int, classes: int, name: str) -> np.ndarray:
    """The labels as int32 `[count]`, if they are `count` integers from 0 to `classes - 1`."""
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iu":
        raise DataError(f"{name} holds labels of type {labels.dtype}; expected integers; write it again")
    if labels.shape == (count, 1):  # Keras writes a column
        labels = labels[:, 0]
    if labels.shape != (count,):
        raise DataError(f"{name} holds labels of shape {labels.shape} for {count} images; expected one per image")
    if labels.min() < 0 or labels.max() >= classes:
        wrong = labels.min() if labels.min() < 0 else labels.max()
        raise DataError(f"{name} holds the label {wrong}; expected 0 to {classes - 1}; download or write it again")
    return labels.astype(np.int32)
