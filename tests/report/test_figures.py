"""Figures of recipes show what the recipes do."""

from dataclasses import replace
from io import BytesIO
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments.airbench import airbench94
from experiments.bag_of_tricks import baseline, final
from fastcifar_jax.augment import AlternatingFlip, Cutout, Flip, GroupedSampling
from fastcifar_jax.models.activations import Celu
from fastcifar_jax.optim import Nesterov
from fastcifar_jax.report import drawing, figures, plot_data, run_figures
from fastcifar_jax.report.tables import arms_of
from fastcifar_jax.runs import experiments as discover
from fastcifar_jax.train import make_train
from tests.helpers_cli import train_and_test
from tests.helpers_page import record
from tests.helpers_plot import NORMED


def lines_of(axis):
    """Label -> x and y of a line."""
    return {line.get_label(): np.array(line.get_data()) for line in axis.get_lines()}


def pictures_of(axis):
    return [image.get_array() for image in axis.get_images()]


@pytest.mark.parametrize("augmentations", [(AlternatingFlip(),), (Cutout(8),), ()])
def test_augmented_images_are_those_of_the_recipe(augmentations):
    dataset = train_and_test()
    recipe = replace(final, augmentations=augmentations, sampling=GroupedSampling(20))
    first, second = plot_data.augmented(recipe, dataset, 8, (1, 2))
    stored = dataset.train_images[:8]
    if augmentations == (AlternatingFlip(),):
        np.testing.assert_array_equal(first, second[:, :, ::-1])
        mirrored = [np.array_equal(a, b[:, ::-1]) for a, b in zip(first, stored, strict=True)]
        as_stored = [np.array_equal(a, b) for a, b in zip(first, stored, strict=True)]
        assert all(np.logical_xor(mirrored, as_stored)) and any(mirrored) and any(as_stored)
    else:
        changed = (first != stored).any(-1).sum((1, 2))
        assert (changed == (64 if augmentations else 0)).all()
        assert np.array_equal(first, second) == (not augmentations)


def test_augmentations_shows_the_images_under_their_classes():
    dataset = train_and_test()
    pictures = plot_data.augmented(replace(final, augmentations=(Flip(),)), dataset, 8, (1, 2))
    figure = figures.augmentations(dataset.train_images[:8], pictures, (1, 2), list("abcdefgh"))
    rows = np.reshape(figure.axes, (3, 8))
    for row, images in zip(rows, (dataset.train_images[:8], *pictures), strict=True):
        for axis, image in zip(row, images, strict=True):
            np.testing.assert_array_equal(pictures_of(axis)[0], image)
    assert [axis.get_title() for axis in rows[0]] == list("abcdefgh")
    assert [row[0].get_ylabel() for row in rows] == ["as stored", "epoch 1", "epoch 2"]


@pytest.mark.parametrize("size", [2, 3])
def test_whitening_shows_numpys_eigenvectors(size):
    noise = np.random.default_rng(0).normal(size=(20, 35, 35, 3))
    near = sum(noise[:, i : i + 32, j : j + 32] for i in range(4) for j in range(4)) * (40, 25, 15) / 4
    images = np.clip(near + 125, 0, 255).astype(np.uint8)
    found = plot_data.eigen_patches(final, train_and_test()._replace(train_images=images), size)

    x = (images - np.array(final.mean)) / final.std
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(1, 2))  # ..., channel, row, column
    rows = np.moveaxis(windows, 3, -1).reshape(-1, size * size * 3)
    eigenvalues, vectors = np.linalg.eigh(rows.T @ rows / (len(rows) - 1))
    np.testing.assert_allclose(found.roots, np.sqrt(eigenvalues[::-1]), rtol=1e-3)
    agreement = np.abs(np.sum(found.vectors.reshape(len(vectors), -1) * vectors.T[::-1], axis=1))
    np.testing.assert_allclose(agreement, 1, atol=1e-3)

    pictures, chart = figures.whitening(found, final).axes
    [line] = chart.get_lines()
    np.testing.assert_allclose(line.get_data(), (np.arange(1, len(vectors) + 1), found.roots))
    drawn = {tuple(image.get_extent()): image.get_array() for image in pictures.get_images()}
    assert len(drawn) == 2 * len(vectors)
    for i, vector in enumerate(found.vectors, start=1):
        for bottom, sign in ((1, 1), (0, -1)):
            expected = np.clip(np.rint(sign * 3 * vector * final.std + final.mean), 0, 255)
            np.testing.assert_array_equal(drawn[i - 0.45, i + 0.45, bottom + 0.05, bottom + 0.95], expected)
    assert [text.get_text() for text in pictures.texts] == [f"{root:.2f}" for root in found.roots]


# Steps and rates of the specification's section 10.
@pytest.mark.parametrize(
    ("recipe", "steps_per_epoch", "rates"),
    [
        (baseline, 97, {1: 0.000824742, 97: 0.08, 485: 0.4, 1000: 0.288225719, 2328: 0.0}),
        (final, 97, {1: 0.005154639, 97: 0.5, 194: 1.0, 485: 0.55, 776: 0.1, 970: 0.1}),
        (airbench94, 48, {0: 11.5 * 0.2, 109: 11.5, 476: 11.5 * 0.07}),
    ],
)
def test_learning_rates_are_the_recipes(recipe, steps_per_epoch, rates):
    found = plot_data.learning_rates(recipe, steps_per_epoch)
    assert len(found.rates) == max(rates) + 1 and found.epochs[-1] == pytest.approx(max(rates) / steps_per_epoch)
    for step, rate in rates.items():
        assert found.rates[step] == pytest.approx(rate, rel=1e-5, abs=1e-7)


def test_schedules_of_one_optimizer_share_a_panel():
    rates = {recipe.name: plot_data.learning_rates(recipe, 48) for recipe in (baseline, final, airbench94)}
    figure = figures.schedules(rates)
    drawn = [lines_of(axis) for axis in figure.axes]
    assert [set(lines) for lines in drawn] == [{"baseline", "final"}, {"airbench94"}]
    for name, line in (drawn[0] | drawn[1]).items():
        np.testing.assert_array_equal(line, (rates[name].epochs, rates[name].rates))
    styles = {(line.get_color(), line.get_linestyle()) for axis in figure.axes for line in axis.get_lines()}
    assert len(styles) == 3


def test_an_optimizer_without_a_schedule_is_refused():
    class Constant:
        def __call__(self, num_epochs, steps_per_epoch, batch_size):
            return Nesterov()(num_epochs, steps_per_epoch, batch_size)

        def __repr__(self):
            return "Constant()"

    with pytest.raises(ValueError, match="Constant has no field `schedule`"):
        plot_data.learning_rates(replace(final, optim=Constant()), 97)


def test_activations_and_slopes():
    values, slopes = figures.activations({"relu": jax.nn.relu, "celu": Celu(0.3)}).axes
    x, y = lines_of(values)["celu"]
    np.testing.assert_allclose(x, np.linspace(-1, 1, 201), atol=1e-6)
    np.testing.assert_allclose(y, np.maximum(x, 0) + np.minimum(0.3 * np.expm1(x / 0.3), 0), atol=1e-6)
    x, slope = lines_of(slopes)["celu"]
    np.testing.assert_allclose(slope, np.where(x < 0, np.exp(x / 0.3), 1), atol=1e-5)
    assert set(np.unique(lines_of(slopes)["relu"][1])) <= {0, 1}


@pytest.mark.slow
def test_norm_history_is_that_of_the_run(workplace):
    Path("normed.py").write_text(NORMED)
    [experiment] = discover.resolve(("normed.py",), None)
    dataset = jax.tree.map(jnp.asarray, train_and_test(64))
    told = []
    history = plot_data.norm_history(experiment.recipe, 10, dataset, told.append, seed=3)
    run = make_train(experiment.recipe, 10)(jax.random.key(3), dataset)
    assert [row.train_loss for row in told] == [row.train_loss for row in run.epochs]
    last = run.state.params["norm"]
    for found, expected in ((history.scales, last["scale"]), (history.biases, last["bias"])):
        assert set(found) == {"norm"} and found["norm"].shape == (3, 4)
        np.testing.assert_array_equal(found["norm"][-1], expected)
        assert (found["norm"][0] != found["norm"][-1]).any()

    figure = figures.norms(history, "title", channels=3)
    for axis, values in zip(figure.axes, (history.scales, history.biases), strict=True):
        drawn = [line.get_data() for line in axis.get_lines()]
        assert len(drawn) == 3
        for channel, (epochs, y) in enumerate(drawn):
            np.testing.assert_array_equal((epochs, y), ([1, 2, 3], values["norm"][:, channel]))
    fixed = figures.norms(history._replace(scales={}), "title")
    assert [axis.get_ylabel() for axis in fixed.axes] == ["bias of the norm"]


@pytest.mark.parametrize("form", ["png", "svg"])
def test_pictures_are_the_same_each_time_and_not_transparent(form):
    rates = {"final": plot_data.learning_rates(final, 97)}
    first, second = (drawing.render(figures.schedules, rates, form=form) for _ in range(2))
    assert first == second
    if form == "svg":
        assert b"<dc:date>" not in first and b"fill: #ffffff" in first
    else:
        with Image.open(BytesIO(first)) as image:
            assert image.convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255)


def test_dollars_and_other_scripts_in_names_are_text():
    arms = arms_of([record(experiment="a$b$\u6f22")])
    assert "a$b$\u6f22 (n = 1)".encode() in drawing.render(run_figures.curves, arms, form="svg")
