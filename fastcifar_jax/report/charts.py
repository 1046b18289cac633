"""Charts as inline SVG: plain functions from numbers to markup, styled by the classes of the page that they stand in.

Every chart is 360 units wide, the width of a phone, so that its letters keep their size there. They are not those of
matplotlib (see `plots`): a page follows its reader's light or dark, speaks to a screen reader, and needs no extra.
"""

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

from fastcifar_jax.analysis.stats import Summary

WIDTH, LEFT, RIGHT, BOTTOM = 360, 46, 348, 36  # of a chart, its frame's sides, and the space below the frame
SHAPES = (  # of markers, about 9 units across
    "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0Z",
    "M-4 -4H4V4H-4Z",
    "M0 -5L5 4H-5Z",
    "M0 -5.5L5.5 0L0 5.5L-5.5 0Z",
)
COLOURS = 5  # classes c0 to c4; with four shapes, twenty markers that differ
LABEL_LENGTH = 42

Point = tuple[float, float]


class Line(NamedTuple):
    """One quantity over the epochs: its name, the style's class, the mean, and the points of each run."""

    name: str
    style: str
    mean: Sequence[Point]
    seeds: Sequence[Sequence[Point]]
    unfinished: Sequence[Sequence[Point]] = ()


class Arm(NamedTuple):
    """What a chart shows of an arm: its number and name on the page, and the values of its runs."""

    number: int
    name: str
    values: Sequence[float]
    summary: Summary


class Cloud(NamedTuple):
    """The runs of an arm as points, and the summaries of both coordinates."""

    number: int
    points: Sequence[Point]
    x: Summary
    y: Summary


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, at most about `most`."""
    span = high - low or abs(high) or 1.0
    rough = span / (most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def ticks_within(found: Sequence[float], least: float, most: float) -> list[float]:
    """Ticks around numbers, for an axis that does not pass `least` and `most` though intervals may."""
    low, high = min(found), max(found)
    return ticks(max(low, least), min(high, most)) if low < most and high > least else ticks(low, high)


def log_ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Round numbers from at or below `low`, which is above 0, to at or above `high`; powers of ten where it is far."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    for steps in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        marks = [step * 10.0**power for power in powers for step in steps]
        first = max(i for i, mark in enumerate(marks) if mark <= low * 1.001)
        last = max(first + 1, min(i for i, mark in enumerate(marks) if mark >= high * 0.999))
        if last - first < most:
            break
    return marks[first : last + 1]


def lines(
    name: str,
    title: str,
    description: str,
    unit: str,
    shown: Sequence[Line],
    marks: Sequence[float],
    *,
    log: bool = False,
) -> str:
    """Quantities over epochs: a mean line each, and a thin line a seed.

    Args:
      name: makes the ids of this chart.
      title: of the chart.
      description: what a reader who does not see it should know.
      unit: label of the y axis.
      shown: at least one point among them.
      marks: ticks of the y axis; what lies outside is cut off.
      log: whether the y axis is logarithmic; all values are above 0 then.
    """
    xs = [x for line in shown for points in (*line.seeds, *line.unfinished) for x, _ in points]
    last = max(max(xs), 2)
    epochs = sorted({round(x) for x in ticks(1, last) if 1 <= x <= last} | {1})
    top, bottom = 26, 190
    x, y = _scale(1, last, LEFT + 8, RIGHT - 8), _scale(marks[0], marks[-1], bottom, top, log=log)
    drawn: list[str] = []
    legend: list[str] = []
    start = float(LEFT)
    for line in shown:
        drawn += [_stroke(f"seed {line.style}", _path(points, x, y)) for points in (*line.seeds, *line.unfinished)]
        for end in (points[-1] for points in line.unfinished):
            drawn.append(_stroke(f"end {line.style}", f"M{x(end[0]) - 3:.1f} {y(end[1]) - 3:.1f}l6 6m0 -6l-6 6"))
    for line in shown:
        drawn.append(_stroke(f"mean {line.style}", _path(line.mean, x, y)))
        drawn += [_dot(f"dot {line.style}", x(epoch), y(value), 2) for epoch, value in line.mean]
        legend += [_stroke(f"mean {line.style}", f"M{start:.0f} 10h24"), _text(start + 29, 14, line.name)]
        start += 40 + 6.5 * len(line.name)
    body = "".join(legend) + _y_axis(marks, y, unit, top, bottom) + _x_axis(epochs, x, "epoch", bottom)
    return _svg(name, title, description, bottom + BOTTOM, body + _clipped(drawn, top, bottom))


def distribution(name: str, title: str, description: str, unit: str, arms: Sequence[Arm]) -> str:
    """A row an arm: a dot a run, and below it the mean with its interval.

    Args:
      name: makes the ids of this chart.
      title: of the chart.
      description: what a reader who does not see it should know.
      unit: label of the x axis.
      arms: at least one; each has values.
    """
    marks = ticks_within([number for arm in arms for number in (*arm.values, *_ends(arm.summary))], 0, 100)
    row, top = 46, 4
    bottom = top + row * len(arms)
    x = _scale(marks[0], marks[-1], LEFT - 28, RIGHT - 4)
    drawn: list[str] = []
    labels: list[str] = []
    for i, arm in enumerate(arms):
        base, colour = top + row * i, _colour(arm.number)
        label = f"{arm.number}  {arm.name}"
        label = label if len(label) <= LABEL_LENGTH else f"{label[: LABEL_LENGTH - 1]}\u2026"
        labels += [marker(arm.number, 10, base + 11), _text(20, base + 15, f"{label} (n = {len(arm.values)})")]
        for j, value in enumerate(sorted(arm.values)):  # at three heights in turn, so that equal runs stay apart
            drawn.append(_dot(f"run {colour}", x(value), base + (25, 22, 28)[j % 3], 3))
        if arm.summary.n > 1:
            low, high = x(arm.summary.low), x(arm.summary.high)
            path = f"M{low:.1f} {base + 37}H{high:.1f}m0 -3v6M{low:.1f} {base + 34}v6"
            drawn.append(_stroke(f"interval {colour}", path))
        drawn.append(_stroke(f"average {colour}", f"M{x(arm.summary.mean):.1f} {base + 32}v10"))
    grid = "".join(_stroke("grid", f"M{x(mark):.1f} {top}V{bottom + 4}") for mark in marks)
    axis = _x_axis(marks, x, unit, bottom + 4)
    body = grid + "".join(labels) + axis + _clipped(drawn, 0, bottom, 0)
    return _svg(name, title, description, bottom + 4 + BOTTOM, body)


def scatter(name: str, title: str, description: str, units: tuple[str, str], clouds: Sequence[Cloud]) -> str:
    """A small dot a run, and a marker with the arm's number at the means, with both intervals.

    Args:
      name: makes the ids of this chart.
      title: of the chart.
      description: what a reader who does not see it should know.
      units: labels of the axes.
      clouds: at least one.
    """
    xs = [number for cloud in clouds for number in (*(point[0] for point in cloud.points), *_ends(cloud.x))]
    ys = [number for cloud in clouds for number in (*(point[1] for point in cloud.points), *_ends(cloud.y))]
    wide, marks = ticks_within(xs, 0, math.inf), ticks_within(ys, 0, 100)
    top, bottom = 12, 260
    x, y = _scale(wide[0], wide[-1], LEFT, RIGHT - 12), _scale(marks[0], marks[-1], bottom, top)
    means = [(x(cloud.x.mean), y(cloud.y.mean)) for cloud in clouds]
    drawn: list[str] = []
    taken = list(means)
    for cloud, mean in zip(clouds, means, strict=True):
        colour = _colour(cloud.number)
        drawn += [_dot(f"run {colour}", x(a), y(b), 2.5) for a, b in cloud.points]
        if cloud.x.n > 1:
            drawn.append(_stroke(f"interval {colour}", f"M{x(cloud.x.low):.1f} {mean[1]:.1f}H{x(cloud.x.high):.1f}"))
        if cloud.y.n > 1:
            drawn.append(_stroke(f"interval {colour}", f"M{mean[0]:.1f} {y(cloud.y.low):.1f}V{y(cloud.y.high):.1f}"))
    for cloud, mean in zip(clouds, means, strict=True):
        place = _free_place(mean, taken)
        taken.append(place)
        drawn += [marker(cloud.number, *mean), _text(place[0], place[1] + 4, str(cloud.number), "number", "middle")]
    body = _y_axis(marks, y, units[1], top, bottom) + _x_axis(wide, x, units[0], bottom)
    return _svg(name, title, description, bottom + BOTTOM, body + _clipped(drawn, 0, bottom, LEFT - 6))


def marker(number: int, x: float, y: float) -> str:
    """The mark of the arm of this number, in its colour and shape."""
    shape = SHAPES[(number - 1) % len(SHAPES)]
    return f'<path class="marker {_colour(number)}" transform="translate({x:.1f} {y:.1f})" d="{shape}"/>'


def _colour(number):
    return f"c{(number - 1) % COLOURS}"


def _ends(summary):
    return (summary.low, summary.high) if summary.n > 1 else ()


def _scale(low, high, start, end, *, log=False) -> Callable[[float], float]:
    """Maps low..high to start..end; what lies far outside stays near the frame, where it is cut off."""
    measure = math.log10 if log else float

    def place(value):
        share = (measure(value) - measure(low)) / (measure(high) - measure(low))
        return start + (end - start) * min(max(share, -9), 10)

    return place


def _path(points, x, y):
    return "M" + "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in points) if points else ""


def _free_place(centre, taken):
    """Where a number beside its marker is clear of other marks, or farthest from them; inside the frame if possible."""
    corners = ((1, -1), (1, 1), (-1, -1), (-1, 1))
    places = [(centre[0] + away * dx, centre[1] + away * dy) for away in (10, 20, 30) for dx, dy in corners]
    inside = [place for place in places if LEFT + 4 < place[0] < RIGHT - 4 and 8 < place[1] < 252] or places
    apart = lambda place: min((math.dist(place, other) for other in taken if other != centre), default=14)
    return max(inside, key=lambda place: min(apart(place), 14))


def _numbers(marks):
    """With as many decimals as the steps have; of uneven steps each with its own."""
    if max(map(abs, marks)) >= 1e7 or len(marks) > 2 and not math.isclose(marks[1] - marks[0], marks[-1] - marks[-2]):
        return [f"{mark:g}" for mark in marks]
    step = marks[1] - marks[0] if len(marks) > 1 else 1
    decimals = next(i for i in range(9) if i == 8 or abs(step - round(step, i)) < 1e-9 * step)
    return [f"{mark + 0.0:,.{decimals}f}" for mark in marks]


def _y_axis(marks, y, unit, top, bottom):
    shown = zip(marks, _numbers(marks), strict=True)
    texts = [_text(LEFT - 6, y(mark) + 4, text, "tick", "end") for mark, text in shown]
    grid = [_stroke("grid", f"M{LEFT} {y(mark):.1f}H{RIGHT}") for mark in marks]
    turn = f'transform="translate(9 {(top + bottom) / 2}) rotate(-90)"'
    return "".join((*grid, *texts, f'<text class="unit" text-anchor="middle" {turn}>{escape(unit)}</text>'))


def _x_axis(marks, x, unit, bottom):
    line = _stroke("axis", f"M{x(marks[0]):.1f} {bottom}H{x(marks[-1]):.1f}")
    strokes = [_stroke("axis", f"M{x(mark):.1f} {bottom}v4") for mark in marks]
    shown = zip(marks, _numbers(marks), strict=True)
    texts = [_text(x(mark), bottom + 16, text, "tick", "middle") for mark, text in shown]
    middle = (x(marks[0]) + x(marks[-1])) / 2
    return "".join((line, *strokes, *texts, _text(middle, bottom + 31, unit, "unit", "middle")))


def _clipped(drawn, top, bottom, left=LEFT):
    """An inner frame, which cuts off what lies outside of it."""
    width, height = RIGHT + 8 - left, bottom + 4 - top
    box = f'x="{left}" y="{top - 3}" width="{width}" height="{height}" viewBox="{left} {top - 3} {width} {height}"'
    return f"<svg {box}>{''.join(drawn)}</svg>"


def _stroke(style, path):
    return f'<path class="{style}" d="{path}"/>'


def _dot(style, x, y, radius):
    return f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>'


def _text(x, y, text, style="label", anchor="start"):
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(name, title, description, height, body):
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="{name}-t" aria-describedby="{name}-d">'
        f'<title id="{name}-t">{escape(title)}</title><desc id="{name}-d">{escape(description)}</desc>{body}</svg>'
    )
