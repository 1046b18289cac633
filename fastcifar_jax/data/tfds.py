"""Data sets of tensorflow-datasets, read and prepared without TensorFlow.

Reading needs no TensorFlow, but the library's preparation uses it to copy files, unpack archives and encode images. So
the CIFAR archives are downloaded and decoded here, and the library only writes them.
"""

import contextlib
import difflib
import importlib.util
import io
import sys
from pathlib import Path

import numpy as np

from fastcifar_jax.data.checks import KINDS, NAMES, DataError, as_data_error, check_labels
from fastcifar_jax.data.cifar import RELEASES, read_tar, split_binary
from fastcifar_jax.data.download import download, open_url
from fastcifar_jax.data.image_folder import decode_image
from fastcifar_jax.types import Dataset

_CIFAR = {  # the labels before each image of the binary releases, and the files with their names
    "cifar10": {"label": "batches.meta.txt"},
    "cifar100": {"coarse_label": "coarse_label_names.txt", "label": "fine_label_names.txt"},
}


def read_tfds(name: str, data_dir: Path | None = None) -> tuple[Dataset, tuple[str, ...]]:
    """Both splits and the class names of a data set, prepared first if need be; by default in the library's own folder.

    Raises:
      DataError: the data set is unknown, cannot be downloaded or prepared, or does not hold labelled 32x32 images.
    """
    import tensorflow_datasets as tfds  # slow to import

    tfds.disable_progress_bar()
    builder = _make_builder(name, data_dir)
    features = dict(builder.info.features)
    has_label = isinstance(features.get("label"), tfds.features.ClassLabel)
    if not has_label or getattr(features.get("image"), "shape", None) != (32, 32, 3):
        raise DataError(f"{name} holds {features!s:.200}; expected (32, 32, 3) 'image' and 'label'; give other data")
    if not builder.data_path.exists():  # the library creates it when everything is written
        _prepare(builder)
        builder = _make_builder(name, data_dir)
    with as_data_error(f"{name} in {builder.data_dir}"):
        splits = list(builder.info.splits)
        test = "test" if "test" in splits else "validation"
        if "train" not in splits or test not in splits:
            raise DataError(f"{name} has splits {splits}; expected train and test (or validation); give other data")
        dataset = Dataset(*_read_split(builder, "train"), *_read_split(builder, test))
        return dataset, tuple(builder.info.features["label"].names)


def _make_builder(name, data_dir):
    import tensorflow_datasets as tfds

    try:
        return tfds.builder(name, file_format="array_record", data_dir=data_dir)
    except Exception as error:
        names = [*NAMES, *tfds.list_builders(with_community_datasets=False)]
        if name.partition("/")[0].partition(":")[0] in names:
            reason = " ".join(str(error).split())[:400]
            raise DataError(
                f"tensorflow-datasets cannot open {name} ({reason}); give an existing configuration and version, or, "
                "if it was prepared in another format than array_record, set TFDS_DATA_DIR to another folder"
            ) from error
        nearest = ", ".join(difflib.get_close_matches(name, sorted(set(names)))) or "none"
        raise DataError(
            f"there is no data set called '{name}' and no such file; nearest names: {nearest}; "
            f"give {', '.join(NAMES)}, another name of tensorflow-datasets, or a path"
        ) from error


def _read_split(builder, split):
    """Images uint8 `[n, 32, 32, 3]` and labels int32 `[n]`."""
    import tensorflow_datasets as tfds

    # The images are decoded here, because tfds would need OpenCV.
    examples = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    images = np.empty((len(examples), 32, 32, 3), np.uint8)
    labels = np.empty(len(examples), np.int64)
    for i, example in enumerate(examples):
        images[i] = decode_image(example["image"], f"{split} image {i}")
        labels[i] = example["label"]
    return images, check_labels(labels, len(labels), builder.info.features["label"].num_classes, split)


def _prepare(builder):
    """Downloads a data set and writes it where tensorflow-datasets keeps it."""
    urls = builder.url_infos or {}
    files = ", ".join(info.filename for info in urls.values())
    if builder.name in _CIFAR:
        [(url, expected)] = urls.items()
        advice = f"fetch {files} by hand, put it anywhere and give its path with --data"
        builder = _cifar_builder(builder, read_tar(download(url, expected.size, expected.checksum, advice), url))
    elif urls:
        if not importlib.util.find_spec("tensorflow"):
            raise DataError(
                f"tensorflow-datasets needs TensorFlow to prepare {builder.name}, once: pip install tensorflow and run "
                f"this again; or give the path of {KINDS}"
            )
        # One attempt here, because tfds makes ten before it gives up.
        folder = builder.data_dir_root / "downloads" / "manual"
        open_url(next(iter(urls)), f"fetch {files} by hand into {folder}").close()
    with contextlib.redirect_stdout(sys.stderr), as_data_error(builder.name):  # tfds prints to stdout
        builder.download_and_prepare(file_format="array_record")


def _cifar_builder(builder, members):
    """The library's builder, which writes the same examples as ever, but from the archive's `members`."""
    from PIL import Image

    [release] = [r for r in RELEASES if r.label_columns and r.test in members]
    keys = _CIFAR[builder.name]

    class FromMembers(type(builder), skip_registration=True):
        name = builder.name

        def _split_generators(self, dl_manager):
            del dl_manager
            for key, file in keys.items():
                self.info.features[key].names = members[file].decode().split()
            return {"train": self._examples("train", release.train), "test": self._examples("test", (release.test,))}

        def _examples(self, split, files):
            count = 0
            for file in files:
                for labels, row in zip(*split_binary(members[file], len(keys), file), strict=True):
                    image = io.BytesIO()  # encoded here, because tfds encodes arrays with TensorFlow
                    Image.fromarray(row.reshape(3, 32, 32).transpose(1, 2, 0)).save(image, "png")
                    image.seek(0)
                    yield count, {"id": f"{split}_{count:05d}", "image": image, **dict(zip(keys, labels, strict=True))}
                    count += 1

    return FromMembers(data_dir=builder.data_dir_root, file_format="array_record")
