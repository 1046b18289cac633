"""The drawing of a network: nested boxes from top to bottom, with types by colour, shapes and parameter counts."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from fastcifar_jax.models.base import LayerInfo, Model
from fastcifar_jax.report.drawing import FAINT, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Light tints of Okabe and Ito's palette under black text, by a part of the type's name; the types are also named.
TINTS = {
    "whiten": "#D5E6F3", "conv": "#A6CEEB", "norm": "#B5E3D3", "activation": "#F9D9A0", "pool": "#F0BFD8",
    "add": "#F3B48B", "linear": "#C9BCE6", "dense": "#C9BCE6",
}  # fmt: skip
OTHER = "#E6E6E6"
WIDTH, INDENT, MARGIN = 8.6, 0.22, 0.08  # of the drawing, and of a box in the one around it, in inches
ROW, GAP = 1.12, 0.13  # distance of rows, and space below the last box in another, in heights of a box
COLUMNS = {"output": 5.8, "trained": 7.1, "constants": 8.2}  # right edges of the columns, in inches


def layers_of(model: Model, name: str) -> list[LayerInfo]:
    """The layers of a network for images of 32x32.

    Raises:
      ValueError: a model without the function `layers`.
    """
    if model.layers is None:
        raise ValueError(
            f"the network of {name!r} cannot be drawn: its Model has no function `layers`; networks made by "
            "`models.layers.linen_model` have one"
        )
    images = jax.ShapeDtypeStruct((2 * model.num_groups, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)), images)
    return model.layers(variables, images)


def draw(layers: Sequence[LayerInfo], title: str) -> "Figure":
    """The drawing.

    Args:
      layers: from `layers_of`, the network itself first.
      title: above the drawing, with the numbers of parameters.
    """
    network, *rows = layers
    inside = {row.path: [other for other in rows if other.path[: len(row.path)] == row.path] for row in rows}
    tops, y = {}, 1.0
    for row, following in zip(rows, (*rows[1:], network), strict=True):
        tops[row.path] = y
        common = sum(a == b for a, b in zip(row.path, following.path, strict=False))
        closed = len(row.path) - common - (len(inside[row.path]) == 1)
        y += ROW + GAP * closed
    figure = new_figure(WIDTH, 0.27 * y + 0.6)
    axis = figure.subplots()
    axis.set(xlim=(0, WIDTH), ylim=(y, -0.3))
    axis.set_axis_off()
    axis.set_title(f"{title}: {network.trained:,} trained parameters, {network.constants:,} constants")
    for name, x in {"layer": 0.1, "type": 1.8, **COLUMNS}.items():
        axis.text(x, 0.5, name, ha="left" if x < 2 else "right", va="center", color="#555555")
    for row in rows:
        last = inside[row.path][-1].path
        height = tops[last] - tops[row.path] + 1 + GAP * (len(last) - len(row.path))
        _draw_layer(axis, row, tops[row.path], height, len(inside[row.path]) > 1)
    return figure


def _draw_layer(axis, row: LayerInfo, top: float, height: float, contains: bool) -> None:
    """One box: filled by type, or a frame around the layers inside."""
    from matplotlib.patches import FancyBboxPatch

    left, right = INDENT * (len(row.path) - 1), WIDTH - MARGIN * (len(row.path) - 1)
    tint = next((tint for part, tint in TINTS.items() if part in row.type.lower()), OTHER)
    look: dict[str, Any] = {"fc": (0, 0, 0, 0.05), "ec": FAINT} if contains else {"fc": tint, "ec": "#444444"}
    look |= {"boxstyle": "round,pad=0,rounding_size=0.08", "mutation_aspect": 3, "lw": 0.8}
    axis.add_patch(FancyBboxPatch((left, top), right - left, height, **look))
    texts = {left + 0.1: row.path[-1], 1.8: " ".join((row.type, row.detail)).strip()}
    for x, text in texts.items():
        axis.text(x, top + 0.5, text, va="center", weight="bold" if contains else "normal")
    counts = (f"{count:,}" if count else "" for count in (row.trained, row.constants))
    for x, text in zip(COLUMNS.values(), ("×".join(map(str, row.shape)), *counts), strict=True):
        axis.text(x, top + 0.5, text, ha="right", va="center")
