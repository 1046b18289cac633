"""Folders of images, and single image files for predictions."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from fastcifar_jax.cli import models
from fastcifar_jax.data import image_folder
from fastcifar_jax.data.load import DataError, load_data
from tests.helpers_data import SMALL, TINY, assert_same, names, refusal, write_folder, write_images
from tests.helpers_fuzz import png_of


def png(size, mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "png")
    return buffer.getvalue()


def test_image_folders(tmp_path):
    path = write_images(tmp_path, TINY[10])
    (path / "train" / names(10)[0] / ".DS_Store").write_bytes(b"not an image")
    got, info = load_data(str(path))
    assert info.classes == tuple(names(10))

    def content(images, labels):
        return sorted((int(y), x.tobytes()) for x, y in zip(images, labels, strict=True))

    assert content(*got[:2]) == content(*TINY[10][:2])
    assert content(*got[2:]) == content(*TINY[10][2:])
    assert list(got.train_labels) != sorted(got.train_labels)  # the first n images hold several classes
    assert_same(load_data(str(path))[0], got)


def test_conversion_to_rgb(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split / "grey").mkdir(parents=True)
        Image.new("L", (32, 32), 7).save(tmp_path / split / "grey" / "a.jpg", quality=100)
        Image.new("RGBA", (32, 32), (7, 7, 7, 9)).save(tmp_path / split / "grey" / "b.PNG")
    got, _ = load_data(str(tmp_path))
    assert (got.train_images == 7).all()


HEAD = (b"IHDR", struct.pack(">IIBBBBB", 32, 32, 8, 2, 0, 0, 0))
FILES = [
    (b"", "cannot be read"),
    (b"GIF89a" + bytes(50), "cannot be read"),
    (png((32, 32))[:40], "cannot be read"),
    (png((32, 32))[:-30], "cannot be read"),
    (png((20_000, 20_000), "1"), "DecompressionBomb"),
    (png_of([HEAD, (b"zTXt", b"a\0\0" + zlib.compress(bytes(32 << 20))), (b"IEND", b"")]), "cannot be read"),
]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        *FILES,
        (png((32, 31)), "32x31 pixels; expected 32x32: resize the images first"),
        (bytes(image_folder.MAX_BYTES + 1), "expected at most 1,048,576"),
    ],
)
def test_hostile_images(tmp_path, content, fault):
    path = write_images(tmp_path / "a", SMALL)
    victim = next((path / "train").rglob("*.png"))
    victim.write_bytes(content)
    message = refusal(path)
    assert str(victim) in message and fault in message


def test_wrong_folders(tmp_path):
    path = write_images(tmp_path / "a", SMALL)
    (path / "test" / "zebra").mkdir()
    assert "the classes ['zebra']" in refusal(path)
    assert "no folder test" in refusal(write_folder(tmp_path / "b" / "train", {}).parent)
    write_folder(tmp_path / "b" / "test", {})
    assert "holds no images" in refusal(tmp_path / "b")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_reading_a_pipe_does_not_block(tmp_path):
    path = write_images(tmp_path / "images", SMALL)
    os.mkfifo(next((path / "train").rglob("*.png")).parent / "z.png")
    assert "z.png is not a regular file" in refusal(path)


@pytest.mark.parametrize(
    ("content", "resize", "fault"),
    [
        *((content, resize, fault) for content, fault in FILES for resize in (False, True)),
        (png((32, 31)), False, "has 32x31 pixels; expected 32x32: resize it, or give --resize"),
        (png((6000, 6000), "1"), True, "has 6000x6000 pixels; expected at most 33,554,432 in all"),
        (bytes(models.MAX_FILE + 1), True, "expected at most 33,554,432"),
    ],
)
def test_hostile_single_images(tmp_path, content, resize, fault):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        models.read_image(path, (32, 32, 3), resize)
    assert fault in str(caught.value) and str(path) in str(caught.value)


def test_resized_images_keep_their_centre_and_orientation(tmp_path):
    """Red above blue, with grey to the left and right; the second file is rotated, and its EXIF data say so."""
    pixels = np.full((64, 100, 3), 128, np.uint8)
    pixels[:, 18:82] = [255, 0, 0]
    pixels[32:, 18:82] = [0, 0, 255]
    upright = Image.fromarray(pixels)
    upright.save(tmp_path / "a.png")
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned by 270 degrees
    turned.save(tmp_path / "b.png", exif=exif)
    for name in ("a.png", "b.png"):
        found = models.read_image(tmp_path / name, (32, 32, 3), True)
        assert found.shape == (32, 32, 3) and found.dtype == np.uint8
        found = found[:, 2:-2]  # the edges are mixed with what is cut off
        assert (found[:14] == [255, 0, 0]).all() and (found[18:] == [0, 0, 255]).all()


def test_resized_images_need_not_be_square(tmp_path):
    (tmp_path / "a.png").write_bytes(png((90, 50)))
    assert models.read_image(tmp_path / "a.png", (24, 40, 3), True).shape == (24, 40, 3)


def test_image_files_have_three_channels(tmp_path):
    (tmp_path / "a.png").write_bytes(png((32, 32)))
    with pytest.raises(DataError, match="takes images of 1 channels"):
        models.read_image(tmp_path / "a.png", (32, 32, 1), False)
