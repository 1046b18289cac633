"""Image files for `predict`, hostile ones too: the right pixels, or one DataError."""

import contextlib
import io

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fastcifar_jax.cli import models as saved_cli
from fastcifar_jax.data.load import DataError


def png(size, mode="RGB", **kwargs):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "png", **kwargs)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "resize", "message"),
    [
        (b"", True, "cannot be read"),
        (b"GIF89a" + bytes(50), True, "cannot be read"),
        (png((32, 32))[:-30], False, "cannot be read"),
        (png((32, 32))[:40], True, "cannot be read"),
        (png((32, 31)), False, "has 32x31 pixels; expected 32x32: resize it, or give --resize"),
        (png((6000, 6000), "1"), True, "has 6000x6000 pixels; at most 33554432 are read"),
        (png((20_000, 20_000), "1"), True, "DecompressionBomb"),
        (bytes(saved_cli.MAX_FILE + 1), True, "the most that is read"),
    ],
)
def test_hostile_images(tmp_path, content, resize, message):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        saved_cli.read_image(path, (32, 32, 3), resize)
    assert message in str(caught.value) and str(path) in str(caught.value)


def test_resized_images_keep_their_centre_and_their_way_up(tmp_path):
    """Red above blue, with grey to the left and right; the second file is turned and says so."""
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
        found = saved_cli.read_image(tmp_path / name, (32, 32, 3), True)
        assert found.shape == (32, 32, 3) and found.dtype == np.uint8
        found = found[:, 2:-2]  # the edges are mixed with what is cut off
        assert (found[:14] == [255, 0, 0]).all() and (found[18:] == [0, 0, 255]).all()


def test_image_files_have_three_channels(tmp_path):
    (tmp_path / "a.png").write_bytes(png((32, 32)))
    with pytest.raises(DataError, match="takes images of 1 channels"):
        saved_cli.read_image(tmp_path / "a.png", (32, 32, 1), False)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(draw=st.data())
def test_only_data_errors_of_images(tmp_path, draw):
    content = bytearray(draw.draw(st.sampled_from([png((32, 32)), png((40, 33), "P"), png((32, 32), "LA")])))
    for _ in range(draw.draw(st.integers(1, 4))):
        content[draw.draw(st.integers(0, len(content) - 1))] ^= draw.draw(st.integers(1, 255))
    (tmp_path / "a.png").write_bytes(
        content[: draw.draw(st.integers(0, len(content)))] if draw.draw(st.booleans()) else content
    )
    with contextlib.suppress(DataError):
        found = saved_cli.read_image(tmp_path / "a.png", (32, 32, 3), draw.draw(st.booleans()))
        assert found.shape == (32, 32, 3) and found.dtype == np.uint8
