"""Image files: folders with train/CLASS/*.png and test/CLASS/*.png, and single PNG or JPEG files."""

import io
from pathlib import Path

import numpy as np

from fastcifar_jax.data.checks import KINDS, DataError, as_data_error, read_bounded
from fastcifar_jax.types import Dataset

MAX_BYTES = 1 << 20  # of one image file; 32x32 pixels without compression take 3 kB
MAX_PIXELS = 1 << 25  # of an image that is resized; a camera's has 12 to 24 million


def read_image_folder(path: Path) -> tuple[Dataset, tuple[str, ...]]:
    """Both splits, in an order shuffled by a fixed seed, and the class names: the sorted folders of train."""
    if not (path / "train").is_dir():
        raise DataError(f"the folder {path} holds no data of a known kind; give the path of {KINDS}")
    if not (path / "test").is_dir():
        raise DataError(f"{path} has a folder train, but no folder test; expected test/CLASS/*.png: add it")
    classes = tuple(sorted(folder.name for folder in (path / "train").iterdir() if folder.is_dir()))
    unknown = sorted({folder.name for folder in (path / "test").iterdir() if folder.is_dir()} - set(classes))
    if unknown:
        raise DataError(f"{path / 'test'} has the classes {unknown[:9]}, which train does not have; add or remove them")
    return Dataset(*_read_split(path / "train", classes), *_read_split(path / "test", classes)), classes


def _read_split(folder, classes):
    files = [
        (file, label)
        for label, name in enumerate(classes)
        for file in sorted((folder / name).glob("*"))
        if file.suffix.lower() in (".png", ".jpg", ".jpeg")
    ]
    if not files:
        raise DataError(f"{folder} holds no images; expected CLASS/*.png, *.jpg or *.jpeg in it: add them")
    # Shuffled, as the published files are: the first n images of a sorted folder would be of one class.
    order = np.random.default_rng(0).permutation(len(files))
    images = np.empty((len(files), 32, 32, 3), np.uint8)
    for image, i in zip(images, order, strict=True):
        file = files[i][0]
        with as_data_error(file):
            image[...] = decode_image(read_bounded(file, MAX_BYTES), file)
    return images, np.array([files[i][1] for i in order], np.int32)


def decode_image(
    data: bytes,
    name: object,
    height: int = 32,
    width: int = 32,
    *,
    resize: bool = False,
    advice: str = "resize the images first",
) -> np.ndarray:
    """The contents `data` of the PNG or JPEG file `name` as uint8 `[height, width, 3]`.

    With `resize`, an image is turned upright as its EXIF data say, its centre is cropped, and it is scaled.

    Raises:
      DataError: without `resize`, an image of another size, with `advice` on what to do; or one with too many pixels.
      Exception: of any type, from the decoder: call it within `as_data_error`.
    """
    from PIL import Image, ImageOps  # slow to import, and not needed by other readers

    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
        # The size is checked before the pixels are decoded, which could take gigabytes.
        size = f"{image.width}x{image.height}"
        if not resize and image.size != (width, height):
            raise DataError(f"{name} has {size} pixels; expected {width}x{height}: {advice}")
        if image.width * image.height > MAX_PIXELS:
            raise DataError(f"{name} has {size} pixels; expected at most {MAX_PIXELS:,} in all: resize it first")
        if not resize:
            return np.asarray(image.convert("RGB"))
        upright = ImageOps.exif_transpose(image).convert("RGB")
        return np.asarray(ImageOps.fit(upright, (width, height), Image.Resampling.BICUBIC))
