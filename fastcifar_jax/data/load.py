"""Every source of images -> uint8 arrays on the host: `load("cifar10")`, `load("digits")`, `load("a/path.npz")`."""

import contextlib
import dataclasses
import difflib
import hashlib
import importlib.util
import io
import os
import sys
import threading
from pathlib import Path

import numpy as np
from jaxtyping import Array

from fastcifar_jax.data import readers
from fastcifar_jax.data.readers import DataError
from fastcifar_jax.types import Dataset

__all__ = ["DataError", "DataInfo", "load"]

CONNECT_SECONDS = 10  # until a server must have answered
NAMES = ("cifar10", "cifar100", "digits")


@dataclasses.dataclass(frozen=True)
class DataInfo:
    """What a run was trained on.

    Attributes:
      source: as it was asked for: a name or a path.
      hash: SHA-256, in hexadecimal, of the images and labels of both splits as they are used.
      classes: the class names, in the labels' order.
      train: number of training images.
      test: number of test images.
    """

    source: str
    hash: str
    classes: tuple[str, ...]
    train: int
    test: int


def load(source: str | None = None, *, limit_train: int | None = None) -> tuple[Dataset, DataInfo]:
    """Loads both splits of a data set.

    Args:
      source: one of
        * `cifar10`, `cifar100` or another tensorflow-datasets name of labelled 32x32 colour images, downloaded once
          into that library's own folder (`TFDS_DATA_DIR`, or `~/tensorflow_datasets`);
        * `digits`: 1,797 handwritten digits that come with scikit-learn, enlarged; they need no network;
        * the path of a CIFAR release, a Keras-style npz file, or a folder with train/CLASS/*.png and test/CLASS/*.png.

        None takes the environment variable `FASTCIFAR_DATA`, and `cifar10` where there is none.
      limit_train: how many training images to keep, the first ones in stored order; None keeps all.

    Returns:
      NumPy arrays, images uint8 `[n, 32, 32, 3]` and labels int32 `[n]`, and what they are.

    Raises:
      DataError: the data cannot be had, is damaged, or has fewer than `limit_train` training images.
    """
    source = str(source or os.environ.get("FASTCIFAR_DATA") or "cifar10")
    path = os.path.expanduser(source)
    file = os.path.exists(path) or source[0] in "./~" or path.endswith((".npz", ".gz", ".tgz", ".tar"))
    if source == "digits":
        dataset, classes = _digits()
    elif file and source not in NAMES:  # a folder called cifar10 is ./cifar10
        dataset, classes = readers.read(Path(path))
    else:
        dataset, classes = _read_tfds(source)
    available = len(dataset.train_images)
    if limit_train is not None:
        if not 1 <= limit_train <= available:
            raise DataError(
                f"limit_train is {limit_train}; {source} has {available} training images: give 1 to {available}"
            )
        images, labels = dataset.train_images[:limit_train], dataset.train_labels[:limit_train]
        dataset = dataset._replace(train_images=images, train_labels=labels)
    info = DataInfo(source, hash_of(*dataset), classes, len(dataset.train_images), len(dataset.test_images))
    return dataset, info


def hash_of(*arrays: np.ndarray | Array) -> str:
    """SHA-256, in hexadecimal, of the bytes of arrays, little-endian."""
    digest = hashlib.sha256()
    for array in map(np.asarray, arrays):
        digest.update(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False)).data)
    return digest.hexdigest()


def _digits():
    from sklearn.datasets import load_digits  # slow to import, and needed only here
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    # Bilinear enlargement from 8 to 32 pixels: the rows of `weights` are the positions of the new pixels' centres.
    weights = np.array([np.interp((np.arange(32) + 0.5) / 4 - 0.5, np.arange(8), unit) for unit in np.eye(8)]).T
    images = weights @ images.reshape(-1, 8, 8) @ weights.T
    images = np.repeat(np.rint(images * (255 / 16)).astype(np.uint8)[..., None], 3, axis=-1)
    train, test = train_test_split(np.arange(len(labels)), test_size=360, random_state=0, stratify=labels)
    labels = labels.astype(np.int32)
    return Dataset(images[train], labels[train], images[test], labels[test]), tuple("0123456789")


# tensorflow-datasets. Reading what it has prepared needs no TensorFlow, but its own preparation does: it copies files,
# unpacks archives and encodes images with it. So the CIFAR archives are fetched and read here, and only written by it.


def _read_tfds(name, data_dir=None):
    """Both splits of the data set that tensorflow-datasets calls `name`, prepared in `data_dir` if they are not yet."""
    import tensorflow_datasets as tfds  # slow to import, and needed only here

    tfds.disable_progress_bar()
    builder = _builder(tfds, name, data_dir)
    features = dict(builder.info.features)
    label = isinstance(features.get("label"), tfds.features.ClassLabel)
    if not label or getattr(features.get("image"), "shape", None) != (32, 32, 3):
        raise DataError(f"{name} holds {features!s:.200}; expected an 'image' of shape (32, 32, 3) and a 'label'")
    if not builder.data_path.exists():  # it appears at once, when all is written
        _prepare(builder)
        builder = _builder(tfds, name, data_dir)
    with readers.as_data_error(f"{name} in {builder.data_dir}"):
        splits = list(builder.info.splits)
        test = "test" if "test" in splits else "validation"
        if "train" not in splits or test not in splits:
            raise DataError(f"{name} has the splits {splits}; expected 'train' and 'test' or 'validation'")
        arrays = _read_split(tfds, builder, "train") + _read_split(tfds, builder, test)
        return Dataset(*arrays), tuple(builder.info.features["label"].names)


def _builder(tfds, name, data_dir):
    try:
        return tfds.builder(name, file_format="array_record", data_dir=data_dir)
    except Exception as error:
        known = {*NAMES, *tfds.list_builders(with_community_datasets=False)}
        if name.partition("/")[0].partition(":")[0] in known:
            reason = " ".join(str(error).split())[:400]
            raise DataError(
                f"tensorflow-datasets cannot open {name} ({reason}); give its right name and version, or, if it was "
                "prepared in another format than array_record, set TFDS_DATA_DIR to another folder"
            ) from error
        near = ", ".join(difflib.get_close_matches(name, sorted(known))) or "none"
        raise DataError(
            f"there is no data called '{name}' and no such file; nearest names: {near}; "
            f"give {', '.join(NAMES)}, another name of tensorflow-datasets, or a path"
        ) from error


def _read_split(tfds, builder, split):
    """Images uint8 `[n, 32, 32, 3]` and labels int32 `[n]`, decoded one by one into the array."""
    # Only the label is decoded by tfds, which would ask for OpenCV.
    examples = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    images = np.empty((len(examples), 32, 32, 3), np.uint8)
    labels = np.empty(len(examples), np.int64)
    for i, example in enumerate(examples):
        images[i] = readers.decode_image(example["image"], f"{split} image {i}")
        labels[i] = example["label"]
    return images, readers.checked_labels(labels, len(labels), builder.info.features["label"].num_classes, split)


def _prepare(builder):
    """Downloads a data set and has it written where tensorflow-datasets keeps it."""
    urls = builder.url_infos or {}
    if builder.name in _CIFAR:
        [(url, expected)] = urls.items()
        archive = _download(
            url, expected, f"fetch {expected.filename} by hand, put it anywhere and give its path with --data"
        )
        members = readers.tar_members(io.BytesIO(archive), url)
        del archive  # 170 MB
        builder = _cifar_builder(builder, members)
    elif urls:
        if not importlib.util.find_spec("tensorflow"):
            raise DataError(
                f"tensorflow-datasets needs TensorFlow to prepare {builder.name}, once: pip install tensorflow and run "
                f"this again; or give the path of {readers.KINDS}"
            )
        files = ", ".join(info.filename for info in urls.values())
        # One attempt here, because tfds itself would make ten before it gives up.
        _open(next(iter(urls)), f"fetch {files} by hand into {builder.data_dir_root / 'downloads' / 'manual'}").close()
    with contextlib.redirect_stdout(sys.stderr), readers.as_data_error(builder.name):
        builder.download_and_prepare(file_format="array_record")


def _open(url, advice):
    """The response of a server that answers within `CONNECT_SECONDS`; one attempt."""
    import requests  # comes with tensorflow-datasets

    outcome = []

    def ask():
        try:
            outcome.append(requests.get(url, stream=True, timeout=CONNECT_SECONDS))
        except Exception as error:
            outcome.append(error)

    # In a thread, because the search for the server's address knows no time limit.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)
    [answer] = outcome or [TimeoutError(f"no answer within {CONNECT_SECONDS} seconds")]
    if isinstance(answer, Exception):
        reason = " ".join(str(answer).split())[:300]
    elif answer.ok:
        return answer
    else:
        reason = f"HTTP status {answer.status_code}"
        answer.close()
    raise DataError(f"cannot download {url} ({reason}); {advice}, or use digits, which need no network")


def _download(url, expected, advice):
    """The bytes at `url`, which must have the size and checksum that tensorflow-datasets knows."""
    with _open(url, advice) as response:
        print(f"downloading {url}, {expected.size} bytes", file=sys.stderr)
        data = bytearray()
        try:
            for block in response.iter_content(1 << 20):
                data += block
                if len(data) > expected.size:
                    break
        except Exception as error:
            raise DataError(f"the download of {url} broke off ({error!s:.200}); try again, or {advice}") from error
    if hashlib.sha256(data).hexdigest() != expected.checksum:
        raise DataError(f"{url} sent {len(data)} bytes that are not the known file of {expected.size}; {advice}")
    return data


_CIFAR = {  # the labels before each image of the binary releases, and the files of their names
    "cifar10": {"label": "batches.meta.txt"},
    "cifar100": {"coarse_label": "coarse_label_names.txt", "label": "fine_label_names.txt"},
}


def _cifar_builder(builder, members):
    """The tensorflow-datasets builder, writing the same examples as ever, but from the archive's `members`."""
    from PIL import Image

    [layout] = [k for k in readers.LAYOUTS if k.columns and k.test in members]
    keys = _CIFAR[builder.name]

    class FromMembers(type(builder), skip_registration=True):
        name = builder.name

        def _split_generators(self, dl_manager):
            del dl_manager
            for key, file in keys.items():
                self.info.features[key].names = members[file].decode().split()
            return {"train": self._examples("train", layout.train), "test": self._examples("test", (layout.test,))}

        def _examples(self, split, files):
            count = 0
            for file in files:
                for labels, row in zip(*readers.binary_rows(members[file], len(keys), file), strict=True):
                    image = io.BytesIO()  # encoded here, because tfds encodes arrays with TensorFlow
                    Image.fromarray(row.reshape(3, 32, 32).transpose(1, 2, 0)).save(image, "png")
                    image.seek(0)
                    yield count, {"id": f"{split}_{count:05d}", "image": image, **dict(zip(keys, labels, strict=True))}
                    count += 1

    return FromMembers(data_dir=builder.data_dir_root, file_format="array_record")
