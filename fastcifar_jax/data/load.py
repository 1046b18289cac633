"""Every source of images -> uint8 arrays on the host: `load_data("cifar10")`, `load_data("a/path.npz")`."""

import dataclasses
import hashlib
import os
from pathlib import Path

import numpy as np
from jaxtyping import Array

from fastcifar_jax.data.checks import KINDS, NAMES, DataError, as_data_error
from fastcifar_jax.data.cifar import read_cifar_archive, read_cifar_folder
from fastcifar_jax.data.image_folder import read_image_folder
from fastcifar_jax.data.npz import read_npz
from fastcifar_jax.data.tfds import read_tfds
from fastcifar_jax.types import Dataset

__all__ = ["DataError", "DataInfo", "hash_of", "load_data"]


@dataclasses.dataclass(frozen=True)
class DataInfo:
    """Description of the data of a run."""

    source: str  # the name or path that was given
    hash: str  # SHA-256, in hexadecimal, of the images and labels of both splits as they are used
    classes: tuple[str, ...]  # class names, in the order of the labels
    train: int  # number of training images
    test: int  # number of test images


def load_data(source: str | None = None, *, limit_train: int | None = None) -> tuple[Dataset, DataInfo]:
    """Loads both splits of a data set.

    Args:
      source: one of
        * `cifar10`, `cifar100` or another tensorflow-datasets name of labelled 32x32 colour images, downloaded once
          into that library's own folder (`TFDS_DATA_DIR`, or `~/tensorflow_datasets`);
        * `digits`: the 1,797 handwritten digits that come with scikit-learn, enlarged; no network is needed;
        * the path of a CIFAR release, a Keras-style npz file, or a folder with train/CLASS/*.png and test/CLASS/*.png.

        None takes the environment variable `FASTCIFAR_DATA`, or `cifar10` if it is not set.
      limit_train: number of training images to keep, the first ones in stored order; None keeps all.

    Returns:
      NumPy arrays, images uint8 `[n, 32, 32, 3]` and labels int32 `[n]`, and their description.

    Raises:
      DataError: the data cannot be obtained, are damaged, or have fewer than `limit_train` training images.
    """
    source = str(source or os.environ.get("FASTCIFAR_DATA") or "cifar10")
    path = os.path.expanduser(source)
    is_path = os.path.exists(path) or source[0] in "./~" or path.endswith((".npz", ".gz", ".tgz", ".tar"))
    if source == "digits":
        dataset, classes = _read_digits()
    elif is_path and source not in NAMES:  # a folder called cifar10 is given as ./cifar10
        dataset, classes = _read_path(Path(path))
    else:
        dataset, classes = read_tfds(source)
    if limit_train is not None:
        available = len(dataset.train_images)
        if not 1 <= limit_train <= available:
            raise DataError(
                f"limit_train is {limit_train}; {source} has {available} training images: give 1 to {available}"
            )
        images, labels = dataset.train_images[:limit_train], dataset.train_labels[:limit_train]
        dataset = dataset._replace(train_images=images, train_labels=labels)
    return dataset, DataInfo(source, hash_of(*dataset), classes, len(dataset.train_images), len(dataset.test_images))


def hash_of(*arrays: np.ndarray | Array) -> str:
    """SHA-256, in hexadecimal, of the bytes of arrays, little-endian."""
    digest = hashlib.sha256()
    for array in map(np.asarray, arrays):
        digest.update(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False)).data)
    return digest.hexdigest()


def _read_path(path):
    with as_data_error(path):
        if path.is_dir():
            return read_cifar_folder(path) or read_image_folder(path)
        if not path.is_file():
            raise DataError(f"there is no file or folder {path}; give the path of {KINDS}")
        if path.suffix == ".npz":
            return read_npz(path)
        if path.name.endswith((".tar.gz", ".tgz", ".tar")):
            return read_cifar_archive(path)
        raise DataError(f"{path} is of no known kind; give the path of {KINDS}")


def _read_digits():
    from sklearn.datasets import load_digits  # slow to import
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    # Bilinear interpolation from 8 to 32 pixels: row i of `weights` is for the centre of the new pixel i.
    weights = np.array([np.interp((np.arange(32) + 0.5) / 4 - 0.5, np.arange(8), unit) for unit in np.eye(8)]).T
    images = weights @ images.reshape(-1, 8, 8) @ weights.T
    images = np.repeat(np.rint(images * (255 / 16)).astype(np.uint8)[..., None], 3, axis=-1)
    train, test = train_test_split(np.arange(len(labels)), test_size=360, random_state=0, stratify=labels)
    labels = labels.astype(np.int32)
    return Dataset(images[train], labels[train], images[test], labels[test]), tuple("0123456789")
