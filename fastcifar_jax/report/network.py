"""The drawing of a network by Graphviz: nested clusters, a colour and a shape for each kind of layer."""

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fastcifar_jax.report.graph import Graph, Layer

if TYPE_CHECKING:
    from graphviz import Digraph

# Light tints of Okabe and Ito's palette under black text, and a shape, so that no kind is told by colour alone.
LOOKS = {
    "images": ("#FFFFFF", "box"),
    "convolution": ("#A6CEEB", "box"),
    "norm": ("#B5E3D3", "ellipse"),
    "activation": ("#F9D9A0", "hexagon"),
    "pool": ("#F0BFD8", "invtrapezium"),
    "linear": ("#7FB5DB", "component"),
    "join": ("#F3B48B", "octagon"),
    "other": ("#E6E6E6", "note"),
}
FONT = "Helvetica,Arial,sans-serif"
_TIMES = "\N{MULTIPLICATION SIGN}"


class NoDot(RuntimeError):
    """Graphviz's program `dot` is not installed, or does not draw."""


def draw(graph: Graph, title: str) -> "Digraph":
    """The drawing, from top to bottom.

    A module with a single layer is no cluster; the layer bears its name, if that says more than the layer's kind.

    Args:
      graph: of `graph_of`.
      title: shown above, with the number of parameters.

    Raises:
      ValueError: there is no Python package graphviz.
    """
    try:
        from graphviz import Digraph
    except ImportError as error:
        raise ValueError(f"drawings need graphviz: {error}; pip install -e '.[plot]'") from error
    counts = ", ".join(_counts(graph.trained, graph.frozen)) or "no parameters"
    drawing = Digraph(
        graph_attr={
            "label": f"{_plain(title)}\n{counts}\n ",
            "labelloc": "t",
            "rankdir": "TB",
            "bgcolor": "white",
            "fontname": FONT,
            "nodesep": "0.3",
            "ranksep": "0.25",
        },
        node_attr={"style": "filled", "fontname": FONT, "fontsize": "11", "color": "#444444", "margin": "0.1,0.05"},
        edge_attr={"color": "#444444", "arrowsize": "0.7"},
    )
    alone = {scope for scope, layers in _clusters(graph).items() if len(layers) == 1}
    _fill(drawing, graph, (), alone, itertools.count())
    for i, layer in enumerate(graph.layers):
        for other in layer.inputs:
            drawing.edge(str(other), str(i))
    return drawing


def render(drawing: "Digraph", form: str) -> bytes:
    """The picture of a drawing.

    Args:
      drawing: of `draw`.
      form: "png" or "svg".

    Raises:
      NoDot: the program `dot` is not on the path, or fails.
    """
    from graphviz import CalledProcessError, ExecutableNotFound

    if form == "png":
        drawing = drawing.copy()
        drawing.attr(dpi="144")
    try:
        return drawing.pipe(format=form, quiet=True)
    except ExecutableNotFound as error:
        raise NoDot("Graphviz's program dot is not installed") from error
    except CalledProcessError as error:
        raise NoDot(f"Graphviz's program dot failed, {error.stderr.decode(errors='replace').strip()}") from error


def _clusters(graph: Graph) -> dict[tuple[str, ...], list[int]]:
    """Every scope but the network's own, and the layers in it and in the scopes inside."""
    clusters: dict[tuple[str, ...], list[int]] = {}
    for i, layer in enumerate(graph.layers):
        for depth in range(1, len(layer.scope) + 1):
            clusters.setdefault(layer.scope[:depth], []).append(i)
    return clusters


def _fill(drawing: "Digraph", graph: Graph, scope: tuple[str, ...], alone: set, numbers: Iterator[int]) -> None:
    """Adds the layers of a scope and the clusters inside it."""
    inside = []
    for i, layer in enumerate(graph.layers):
        below = layer.scope[: len(scope) + 1]
        if layer.scope[: len(scope)] != scope:
            continue
        if below == scope or below in alone:
            colour, shape = LOOKS[layer.kind]
            name = layer.scope[-1] if below in alone else ""
            drawing.node(str(i), _text(layer, name), fillcolor=colour, shape=shape)
        elif below not in inside:
            inside.append(below)
    for child in inside:
        layers = [layer for layer in graph.layers if layer.scope[: len(child)] == child]
        trained, frozen = sum(layer.trained for layer in layers), sum(layer.frozen for layer in layers)
        # Short lines, justified to the left: the edge into the cluster comes down through its middle.
        lines = (_plain(child[-1]), f"{trained:,}" * bool(trained), f"{frozen:,} frozen" * bool(frozen))
        with drawing.subgraph(name=f"cluster{next(numbers)}") as cluster:
            cluster.attr(label="".join(f"{line}\\l" for line in lines if line), labeljust="l", fontsize="11")
            cluster.attr(style="rounded,filled", color="#999999", fillcolor="#0000000D")
            _fill(cluster, graph, child, alone, numbers)


def _text(layer: Layer, name: str) -> str:
    """The lines of a node."""
    known = layer.label.startswith(name.lower().split("_")[0])  # of "Conv_0: conv 3x3" one is enough
    lines = [layer.label if known else f"{name}: {layer.label}", _TIMES.join(map(str, layer.shape))]
    lines += _counts(layer.trained, layer.frozen)
    return "\n".join(map(_plain, lines))


def _plain(text: str) -> str:
    """Text whose backslashes mean nothing to Graphviz."""
    return text.replace("\\", "\\\\")


def _counts(trained: int, frozen: int) -> list[str]:
    return [f"{trained:,} parameters"] * bool(trained) + [f"{frozen:,} frozen"] * bool(frozen)
