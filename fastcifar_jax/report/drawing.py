"""The style of all figures, and figures as PNG, as SVG and as inline SVG of a page."""

import io
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Contrast with white and with a dark page is about 3:1 or more; after Okabe and Ito, with grey and brown.
COLOURS = ("#1F83C7", "#D55E00", "#009E73", "#C86FA3", "#8C8C8C", "#A6761D")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))  # 30 combinations of colour and dashes
MARKERS = "osD^vPX*<>"
TEXT = "#000000"  # `currentColor` in a page
FAINT = "#8C8C8C"
STYLE: Any = {
    "figure.facecolor": "white",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.alpha": 0.35,
    "font.size": 10,
    "legend.frameon": False,
    "text.parse_math": False,  # names may contain dollar signs
    "svg.fonttype": "none",
    "svg.hashsalt": "fastcifar_jax",  # the same ids in every file
}


def line_style(i: int) -> dict[str, Any]:
    """Colour and dashes of line `i`; lines of the same colour differ in their dashes."""
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i % len(DASHES)]}


def marker_style(i: int) -> dict[str, Any]:
    """Colour and shape of marker `i`."""
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure outside pyplot's state; sizes in inches."""
    from matplotlib.figure import Figure  # not at import: most commands draw nothing

    return Figure(figsize=(width, height), layout="constrained")


def render(plot: Callable[..., "Figure"], *arguments: Any, form: str, **options: Any) -> bytes:
    """The picture of a plot; the same arguments and version of matplotlib give the same bytes.

    Args:
      plot: draws a figure.
      *arguments: arguments of `plot`.
      form: "png" or "svg".
      **options: options of `Figure.savefig`.
    """
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # the viewer of an SVG has other fonts
        metadata = {"svg": {"Date": None}, "png": {"Software": None}}[form]
        plot(*arguments).savefig(buffer, format=form, dpi=150, metadata=metadata, **options)
    return buffer.getvalue()


def inline_svg(plot: Callable[..., "Figure"], *arguments: Any, name: str, title: str, description: str) -> str:
    """A plot as an SVG element for a page: it takes the page's text colour and fonts and has no inline style.

    Args:
      plot: draws a figure.
      *arguments: arguments of `plot`.
      name: prefix of the ids, unique in the page.
      title: read by screen readers.
      description: what the figure shows, read by screen readers.
    """
    svg = ElementTree.fromstring(render(plot, *arguments, form="svg", transparent=True))
    for child in list(svg)[:2]:  # the metadata, and a style that would apply to the whole page
        svg.remove(child)
    for element in svg.iter():
        attributes = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        styles = (item.partition(": ") for item in attributes.pop("style", "").split("; ") if item)
        attributes |= {key: value for key, _, value in styles if key != "font-family"}
        element.tag = element.tag.rpartition("}")[2]
        if element.tag == "g":
            attributes.pop("id", None)
        if "id" in attributes:
            attributes["id"] = f"{name}-{attributes['id']}"
        for key in attributes.keys() & {"href", "clip-path"}:
            attributes[key] = attributes[key].replace("#", f"#{name}-")
        element.attrib = {key: "currentColor" if value == TEXT else value for key, value in attributes.items()}
    frame = {"viewBox": svg.get("viewBox", ""), "role": "img", "fill": "currentColor", "stroke-linejoin": "round"}
    svg.attrib = frame | {"aria-labelledby": f"{name}-t", "aria-describedby": f"{name}-d"}
    for i, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ElementTree.Element(tag, id=f"{name}-{tag[0]}")
        element.text = text
        svg.insert(i, element)
    return ElementTree.tostring(svg, encoding="unicode")
