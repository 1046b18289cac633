"""Figures of recipes: images, eigenvectors, functions and schedules, from the arrays of `plot_data`."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from fastcifar_jax.recipe import Recipe
from fastcifar_jax.report.drawing import COLOURS, MARKERS, line_style, new_figure
from fastcifar_jax.report.plot_data import EigenPatches, NormHistory, Rates, to_pixels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def augmentations(images: np.ndarray, augmented: np.ndarray, epochs: Sequence[int], titles: Sequence[str]) -> "Figure":
    """Images as they are stored, and below as epochs show them.

    Args:
      images: uint8 `[images, height, width, channels]`.
      augmented: uint8 `[epochs, images, height, width, channels]`.
      epochs: 1-based.
      titles: classes of the images.
    """
    figure = new_figure(1.25 * len(images), 1.3 * (1 + len(epochs)) + 0.3)
    axes = figure.subplots(1 + len(epochs), len(images), squeeze=False)
    labels = ("as stored", *(f"epoch {epoch}" for epoch in epochs))
    for row, pictures, label in zip(axes, (images, *augmented), labels, strict=True):
        row[0].set_ylabel(label)
        for axis, picture in zip(row, pictures, strict=True):
            _picture(axis, picture)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=10)
    return figure


def whitening(patches: EigenPatches, recipe: Recipe) -> "Figure":
    """Eigenvectors with both signs over the roots of their eigenvalues.

    Three times the unit vector is added to the mean colour, as in the original's picture.

    Args:
      patches: of `plot_data.eigen_patches`.
      recipe: whose mean and standard deviation turn them into pixels.
    """
    index = np.arange(1, len(patches.roots) + 1)
    figure = new_figure(0.5 * len(index) + 1, 4.2)
    pictures, chart = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2))
    for i, root, vector in zip(index, patches.roots, patches.vectors, strict=True):
        pictures.text(i, 2.05, f"{root:.2f}", ha="center", fontsize=8)
        for bottom, sign in ((1, 1), (0, -1)):
            picture = to_pixels(sign * 3 * vector, recipe)
            pictures.imshow(picture, extent=(i - 0.45, i + 0.45, bottom + 0.05, bottom + 0.95), interpolation="nearest")
    pictures.set(aspect="auto", xlim=(0.5, len(index) + 0.5), ylim=(0, 2.4))
    pictures.set_yticks((2.15, 1.5, 0.5), ("root", "+", "\N{MINUS SIGN}"))
    _bare(pictures)
    pictures.tick_params(bottom=False, labelbottom=False)
    # A root of 0, as of patches that are all grey, has no place on a logarithmic axis; the number above says it.
    chart.plot(index, np.where(patches.roots > 0, patches.roots, np.nan), "o-", color=COLOURS[0])
    chart.set(xlabel="eigenvector", ylabel="root of the eigenvalue\n(normalised units)", yscale="log", xticks=index)
    chart.yaxis.set_major_formatter("{x:g}")
    return figure


def activations(functions: Mapping[str, Callable]) -> "Figure":
    """Elementwise functions from -1 to 1, and their slopes."""
    x = jnp.linspace(-1, 1, 201)
    figure = new_figure(10, 4)
    axes = figure.subplots(1, 2)
    for i, (name, function) in enumerate(functions.items()):
        slopes = jax.vmap(jax.grad(function))(x)
        for axis, y in zip(axes, (function(x), slopes), strict=True):
            axis.plot(x, y, label=name, **line_style(i), lw=2)
    for axis, label in zip(axes, ("value", "slope"), strict=True):
        axis.set(xlabel="input", ylabel=label)
    axes[0].legend()
    return figure


def schedules(rates: Mapping[str, Rates]) -> "Figure":
    """Learning rates by epoch, one panel for each kind of optimiser: their rates do not mean the same."""
    optimizers = list(dict.fromkeys(rate.optimizer for rate in rates.values()))
    figure = new_figure(8, 1 + 3 * len(optimizers))
    axes = dict(zip(optimizers, figure.subplots(len(optimizers), 1, sharex=True, squeeze=False)[:, 0], strict=True))
    for i, (name, rate) in enumerate(rates.items()):
        axes[rate.optimizer].plot(rate.epochs, rate.rates, label=name, **line_style(i), lw=2)
    for optimizer, axis in axes.items():
        axis.set(ylabel=f"learning rate of {optimizer}", ylim=(0, None), xlim=(0, None))
        axis.legend()
    axes[optimizers[-1]].set_xlabel("time (epochs)")
    return figure


def norms(history: NormHistory, title: str, channels: int = 8) -> "Figure":
    """The first channels' scales and biases after each epoch, a colour and a marker for each layer (section 7.6)."""
    parts = {"scale": history.scales, "bias": history.biases}
    parts = {name: layers for name, layers in parts.items() if layers}
    figure = new_figure(5.2 * len(parts) + 2, 4.5)
    axes = figure.subplots(1, len(parts), squeeze=False)[0]
    handles: dict[str, Any] = {}
    for axis, (name, layers) in zip(axes, parts.items(), strict=True):
        for i, (layer, values) in enumerate(layers.items()):
            epochs = np.arange(1, len(values) + 1)
            style = line_style(i) | {"marker": MARKERS[i % len(MARKERS)], "ms": 3}
            lines = axis.plot(epochs, values[:, :channels], alpha=0.7, lw=1, **style)
            handles.setdefault(layer, lines[0])
        axis.set(xlabel="epoch", ylabel=f"{name} of the norm")
        axis.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(list(handles.values()), list(handles), loc="outside right upper", title="layer")
    figure.suptitle(title, fontsize=10)
    return figure


def _picture(axis: "Axes", image: np.ndarray) -> None:
    axis.imshow(image, interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    _bare(axis)


def _bare(axis: "Axes") -> None:
    axis.grid(False)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
