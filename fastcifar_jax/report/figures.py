"""Plots through matplotlib, from the arrays of `plot_data` to figures, and from figures to PNG or SVG."""

import io
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from fastcifar_jax.analysis import stats
from fastcifar_jax.analysis.compare import Arm, values_of
from fastcifar_jax.recipe import Recipe
from fastcifar_jax.report.plot_data import EigenPatches, NormHistory, Rates, to_pixels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, with grey for its yellow, which is lost on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C8C")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))  # five beside eight colours: 40 lines before a look returns
MARKERS = "osD^vPX*<>"
STYLE: Any = {
    "figure.facecolor": "white",
    "savefig.facecolor": "white",  # not transparent: a dark page must not shine through
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "font.size": 10,
    "legend.frameon": False,
    "text.parse_math": False,  # a name may hold a dollar
    "svg.hashsalt": "fastcifar_jax",  # the same names of elements in every file
}


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure that no state of pyplot knows of.

    Args:
      width: in inches.
      height: in inches.

    Raises:
      ValueError: there is no matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(f"plots need matplotlib: {error}; pip install -e '.[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def render(plot: Callable[..., "Figure"], *arguments, form: str) -> bytes:
    """A plot's picture; the same arguments and version of matplotlib give the same bytes.

    Args:
      plot: one of the functions below.
      *arguments: its arguments.
      form: "png" or "svg".

    Raises:
      ValueError: there is no matplotlib.
    """
    new_figure(1, 1)
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        metadata = {"svg": {"Date": None}, "png": {"Software": None}}[form]
        plot(*arguments).savefig(buffer, format=form, dpi=150, metadata=metadata)
    return buffer.getvalue()


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
            axis.plot(x, y, label=name, **_style(i), lw=2)
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
        axes[rate.optimizer].plot(rate.epochs, rate.rates, label=name, **_style(i), lw=2)
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
            style = _style(i) | {"marker": MARKERS[i % len(MARKERS)], "ms": 3}
            lines = axis.plot(epochs, values[:, :channels], alpha=0.7, lw=1, **style)
            handles.setdefault(layer, lines[0])
        axis.set(xlabel="epoch", ylabel=f"{name} of the norm")
        axis.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(list(handles.values()), list(handles), loc="outside right upper", title="layer")
    figure.suptitle(title, fontsize=10)
    return figure


def convergence(series: Mapping[str, Mapping[float, Arm]]) -> "Figure":
    """Test accuracy against the length of a run: every run, the means, and their 95 % t intervals.

    Args:
      series: name -> epochs -> the runs of that length, from `plot_data.lengths_of`.
    """
    figure = new_figure(11, 4.5)
    axes = figure.subplots(1, 2, sharey=True)
    metrics = {"test_accuracy": "test accuracy (%)", "tta_accuracy": "test accuracy with TTA (%)"}
    for axis, (metric, label) in zip(axes, metrics.items(), strict=True):
        for i, (name, arms) in enumerate(series.items()):
            values = {epochs: list(values_of(arm, metric).values()) for epochs, arm in arms.items()}
            values = {epochs: found for epochs, found in values.items() if found}
            if not values:
                continue
            summaries = [stats.summarize(found) for found in values.values()]
            means = np.array([summary.mean for summary in summaries])
            half = np.nan_to_num([summary.high - summary.mean for summary in summaries])  # NaN: a single run
            style, marker, text = _style(i), MARKERS[i % len(MARKERS)], _counted(name, arms)
            axis.errorbar(list(values), means, half, **style, marker=marker, capsize=4, lw=2, elinewidth=1, label=text)
            points = [(epochs, value) for epochs, found in values.items() for value in found]
            axis.plot(*zip(*points, strict=True), marker, color=style["color"], mfc="none", ms=5)
        axis.set(xlabel="length of the run (epochs)", ylabel=label)
        axis.set_xticks(sorted({epochs for arms in series.values() for epochs in arms}))
    axes[1].yaxis.set_tick_params(labelleft=True)
    _legend_above(figure, axes[0], "mean with its 95 % interval; open: single runs")
    return figure


def curves(arms: Sequence[Arm]) -> "Figure":
    """Accuracy and loss by epoch, in training and in the test: thin lines for the finished runs, thick for their mean.

    Args:
      arms: of `plot_data.arms_of`.
    """
    figure = new_figure(11, 7.5)
    axes = figure.subplots(2, 2, sharex=True)
    panels = {
        "train_accuracy": (100, "training accuracy (%)"),
        "test_accuracy": (100, "test accuracy (%)"),
        "train_loss": (1, "training loss (nats an image)"),
        "test_loss": (1, "test loss (nats an image)"),
    }
    for axis, (column, (scale, label)) in zip(axes.flat, panels.items(), strict=True):
        for i, arm in enumerate(arms):
            runs = [record.epochs for record in arm.records if record.status == "finished"]
            if not runs:
                continue
            epochs = [row.epoch for row in runs[0]]
            values = scale * np.array([[getattr(row, column) for row in rows] for rows in runs])
            style = _style(i)
            axis.plot(epochs, values.T, **style, lw=0.8, alpha=0.5)
            marker = {"marker": MARKERS[i % len(MARKERS)], "ms": 5, "markevery": max(1, len(epochs) // 8)}
            axis.plot(epochs, values.mean(0), **style, lw=2, **marker, label=_counted(arm.name, {0: arm}))
        axis.set_ylabel(label)
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in axes[1]:
        axis.set_xlabel("epoch")
    _legend_above(figure, axes[0, 0], "mean; thin: single runs")
    return figure


def _counted(name: str, arms: Mapping[float, Arm]) -> str:
    """The name with the number of runs that are drawn, and of those that are not."""
    statuses = [[record.status for record in arm.records] for arm in arms.values()]
    finished = sorted({found.count("finished") for found in statuses})
    counts = f"n = {finished[0]}" + (f" to {finished[-1]}" if len(finished) > 1 else "")
    for status in ("diverged", "crashed"):
        number = list(itertools.chain(*statuses)).count(status)
        counts += f", {number} {status}" if number else ""
    return f"{name} ({counts})"


def _legend_above(figure: "Figure", axis: "Axes", title: str) -> None:
    """One legend for all panels, where it hides no line."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 3), title=title)


def _style(i: int) -> dict:
    """Colour and dashes of line `i`: told apart without colour too."""
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i % len(DASHES)]}


def _picture(axis: "Axes", image: np.ndarray) -> None:
    axis.imshow(image, interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    _bare(axis)


def _bare(axis: "Axes") -> None:
    axis.grid(False)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
