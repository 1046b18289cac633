"""Folders of images."""

import os

import pytest
from PIL import Image

from fastcifar_jax.data import image_folder
from fastcifar_jax.data.load import load_data
from tests.helpers_data import BAD_IMAGES, SMALL, TINY, assert_same, names, png, refusal, write_folder, write_images


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


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        *BAD_IMAGES,
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
