"""The commands `predict` and `evaluate` on models of a linear network, and the image files that `predict` reads."""

import contextlib
import itertools
import json
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from fastcifar_jax.analysis.calibration import measure
from fastcifar_jax.cli import models
from fastcifar_jax.data.load import DataError, load_data
from fastcifar_jax.evaluate import SixViewTTA
from fastcifar_jax.runs import experiments
from fastcifar_jax.runs.saved_model import of_run, save_model
from tests.helpers_cli import train_and_test
from tests.helpers_data import BAD_IMAGES, png, write_npz
from tests.helpers_fuzz import COUNTS, fuzz, mutants

EVALUATE = ("evaluate", "a.safetensors", "--recipe", "trick.py", "--data")


@pytest.fixture
def trick(workplace):
    """Writes a.safetensors, a model of trick.py with random weights: `(model, dataset, info)`."""
    [experiment] = experiments.resolve(("trick.py",), None)
    recipe = replace(experiment.recipe, tta=SixViewTTA(), compute_dtype="float32")
    dataset, info = load_data("tiny.npz")
    w = jnp.asarray(np.random.default_rng(0).normal(size=(3, 10)), "float32")
    variables = {"params": {"w": w}, "constants": {}, "batch_stats": {}}
    model = of_run(recipe, info, dataset, 3, variables, (0.25, 0.5))
    save_model(model, Path("a.safetensors"))
    return model, dataset, info


def test_evaluate(trick, call):
    model, dataset, info = trick
    arguments = (*EVALUATE, "tiny.npz", "--json", "answer.json")
    status, out, err = call(*arguments)
    assert (status, err) == (0, "") and "test 25.00 %, TTA 50.00 % (tiny.npz; the same test images)" in out
    answer = json.loads(Path("answer.json").read_text())
    plain, views = model.logits(dataset.test_images)
    for name, logits in (("plain", plain), ("tta", views)):
        assert answer[name] == measure(logits, dataset.test_labels)
        for number in ("loss", "calibration error"):
            assert f"{answer[name][number]:.4f}" in out
    for true, predicted in itertools.product(range(10), repeat=2):
        expected = ((dataset.test_labels == true) & (views.argmax(-1) == predicted)).sum()
        assert answer["confusion"][true][predicted] == expected
    assert answer["test_images_on_record"] and answer["recipe_hash"] == model.recipe.hash
    assert answer["data_hash"] == info.hash and answer["recorded"] == {"test_accuracy": 0.25, "tta_accuracy": 0.5}

    status, out, _ = call(*arguments, "--limit-test", "10")
    assert status == 0 and "other test images" in out and "10 images" in out
    assert json.loads(Path("answer.json").read_text())["test_images"] == 10
    status, _, err = call(*arguments, "--limit-test", "21")
    assert status == 2 and "limit_test is 21; tiny.npz has 20 test images" in err


def test_classes_of_the_data(trick, call):
    """Other names are pointed out, more classes are refused."""
    save_model(replace(trick[0], classes=tuple("abcdefghij")), Path("a.safetensors"))
    assert "names its classes differently" in call(*EVALUATE, "tiny.npz")[1]
    dataset = train_and_test()
    dataset.test_labels[0] = 10
    status, _, err = call(*EVALUATE, str(write_npz("more.npz", dataset)))
    assert status == 2 and "has 11 classes, the model 10" in err


def test_many_classes_show_their_commonest_confusions(trick, call):
    model, dataset, _ = trick
    variables = {"params": {"w": jnp.zeros((3, 30))}, "constants": {}, "batch_stats": {}}
    classes = tuple(f"class{i}" for i in range(30))
    save_model(replace(model, variables=variables, classes=classes), Path("a.safetensors"))
    counts = np.bincount(dataset.test_labels)  # all are taken for class 0
    rows = [line.split() for line in call(*EVALUATE, "tiny.npz")[1].splitlines()]
    assert all([f"class{i}", "class0", str(n)] in rows for i, n in enumerate(counts) if i and n)


def test_predict(trick, call):
    model, dataset, _ = trick
    images = dataset.test_images[:2]
    for i, image in enumerate(images):
        Image.fromarray(image).save(f"{i}.png")
    status, out, err = call("predict", "a.safetensors", "0.png", "1.png", "--recipe", "trick.py", "--json", "a.json")
    assert (status, err) == (0, "")
    answer, expected = json.loads(Path("a.json").read_text()), model.predict(images)
    np.testing.assert_array_equal(np.array(answer["probabilities"], np.float32), expected)
    assert answer["images"] == ["0.png", "1.png"] and answer["classes"] == list("0123456789")
    for row in expected:
        assert all(f"{i} {100 * row[i]:.2f} %" in out for i in np.argsort(-row)[:3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("evaluate a.safetensors --data tiny.npz", "or --recipe\n"),
        ("predict a.safetensors missing.png --recipe trick.py", "missing.png"),
        ("predict b.safetensors missing.png", "b.safetensors: there is no such file"),
        ("predict a.safetensors a.png --recipe final*", "recipes; give one\n"),
    ],
)
def test_refused(trick, call, arguments, message):
    status, _, err = call(*arguments.split())
    assert status == 2 and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "resize", "fault"),
    [
        *((content, resize, fault) for content, fault in BAD_IMAGES for resize in (False, True)),
        (png((32, 31)), False, "has 32x31 pixels; expected 32x32: resize it, or give --resize"),
        (png((6000, 6000), "1"), True, "has 6000x6000 pixels; expected at most 33,554,432 in all"),
        (bytes(models.MAX_FILE + 1), True, "expected at most 33,554,432"),
    ],
)
def test_hostile_images(tmp_path, content, resize, fault):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        models.read_image(path, (32, 32, 3), resize)
    assert fault in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.filterwarnings("ignore::Warning")
def test_any_image(tmp_path, count):
    pngs = [png((32, 32)), png((40, 33), "P"), png((32, 32), "LA")]

    def body(drawn):
        (tmp_path / "a.png").write_bytes(drawn[0])
        with contextlib.suppress(DataError):
            found = models.read_image(tmp_path / "a.png", (32, 32, 3), drawn[1])
            assert found.shape == (32, 32, 3) and found.dtype == np.uint8

    fuzz(count, st.tuples(st.one_of(*map(mutants, pngs)), st.booleans()), body)


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


def test_shape_of_the_model(tmp_path):
    (tmp_path / "a.png").write_bytes(png((90, 50)))
    assert models.read_image(tmp_path / "a.png", (24, 40, 3), True).shape == (24, 40, 3)
    with pytest.raises(DataError, match="takes images of 1 channels"):
        models.read_image(tmp_path / "a.png", (50, 90, 1), False)
