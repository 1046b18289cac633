"""The page of `report`: it can be read without script or network, and its charts show what the records hold."""

import dataclasses
import html
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from experiments.bag_of_tricks import baseline, final
from fastcifar_jax.analysis import stats
from fastcifar_jax.report import charts, tables
from fastcifar_jax.report import html as page
from fastcifar_jax.runs import records
from tests.helpers_page import EXPERIMENTS, MIXED, Page, arms_of, cells, hostile, html_of, record

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def test_page_is_well_formed_alone_and_says_what_it_is():
    parsed = Page(html_of(MIXED))
    ids = [attributes["id"] for _, attributes, _ in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes, _ in parsed.elements:
        for name in ("aria-labelledby", "aria-describedby"):
            assert attributes.get(name, ids[0]) in ids
        assert attributes.get("href", "#").startswith("#") and "src" not in attributes and "style" not in attributes
        assert not any(name.startswith("on") for name in attributes)
    names = {name for name, _, _ in parsed.elements}
    assert names >= {"header", "nav", "main", "section", "footer", "title", "h1", "h2"}
    assert not names & {"script", "link", "img", "iframe", "object"} and "url(" not in page.STYLE
    assert any("default-src 'none'" in attributes.get("content", "") for attributes, _ in parsed.named("meta"))
    assert ("html", {"lang": "en"}, []) in parsed.elements and "width=device-width" in str(parsed.named("meta"))
    assert [text for _, text in parsed.named("h2")] == list(page.SECTIONS.values())


def test_every_table_and_chart_can_be_read_aloud():
    parsed = Page(html_of(MIXED))
    assert len(parsed.named("table")) == len(parsed.named("caption")) == 6
    assert {attributes["scope"] for attributes, _ in parsed.named("th")} == {"col", "row"}
    shown = [attributes for name, attributes, above in parsed.elements if name == "svg" and "svg" not in above]
    images = [attributes for attributes in shown if attributes.get("role") == "img"]
    assert all(attributes.get("aria-hidden") == "true" for attributes in shown if attributes not in images)
    assert len(images) == 3 * 2 + 1 + 1  # two curves an arm, the distribution, the time
    assert len(parsed.named("figure")) == len(parsed.named("figcaption")) == 3 + 1 + 1
    assert all(text for name in ("title", "desc", "figcaption") for _, text in parsed.named(name))
    assert len(parsed.named("desc")) == len(images)


def test_colours_stand_out_from_both_backgrounds():
    def luminance(colour):
        digits = colour * 2 if len(colour) == 3 else colour
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(a, b):
        low, high = sorted((luminance(a), luminance(b)))
        return (high + 0.05) / (low + 0.05)

    schemes = re.findall(r":root \{(.*?)\}", page.STYLE, re.DOTALL)
    assert len(schemes) == 2
    for scheme in schemes:
        colours = dict(re.findall(r"--(\w+): #(\w+)", scheme))
        assert all(contrast(colours[name], colours["back"]) >= 4.5 for name in ("text", "faint"))
        assert all(contrast(colours[f"c{i}"], colours["back"]) >= 2.9 for i in range(charts.COLOURS))


def axis(svg, line):
    """A function from places along an axis of a chart to values, by its first and last tick."""
    if line == "x":
        found = re.findall(r'class="tick" x="([\d.]+)" y="[\d.]+" text-anchor="middle">([^<]+)', svg)
    else:
        found = [
            (y, text) for y, text in re.findall(r'class="tick" x="[\d.]+" y="([\d.]+)" text-anchor="end">([^<]+)', svg)
        ]
        found = [(float(y) - 4, text) for y, text in found]
    (a, low), (b, high) = ((float(place), float(text.replace(",", ""))) for place, text in (found[0], found[-1]))
    return lambda place: low + (float(place) - a) * (high - low) / (b - a), low, high


def test_distribution_is_drawn_where_the_numbers_are():
    values = (90.0, 91.0, 92.5, 92.5)
    found = stats.summarize(values)
    svg = charts.distribution("x", "t", "d", "accuracy", [charts.Arm(1, "final", values, found)])
    at, low, high = axis(svg, "x")
    dots = [at(x) for x in re.findall(r'<circle class="run c0" cx="([\d.]+)"', svg)]
    assert dots == pytest.approx(values, abs=0.02)
    (mean,), ((start, end),) = (
        re.findall(r'"average c0" d="M([\d.]+) ', svg),
        re.findall(r'"interval c0" d="M([\d.]+) \d+H([\d.]+)', svg),
    )
    assert (at(mean), at(start), at(end)) == pytest.approx((found.mean, found.low, found.high), abs=0.02)
    assert low <= found.low and high >= found.high


def test_scatter_is_drawn_where_the_numbers_are():
    points = [(10.0, 90.0), (11.0, 92.0)]
    x, y = (stats.summarize(values) for values in zip(*points, strict=True))
    single = charts.Cloud(2, [(15.0, 80.0)], stats.summarize([15.0]), stats.summarize([80.0]))
    svg = charts.scatter("x", "t", "d", ("s", "%"), [charts.Cloud(1, points, x, y), single])
    (at_x, *_), (at_y, *_) = axis(svg, "x"), axis(svg, "y")
    places = re.findall(r'<circle class="run c\d" cx="([\d.]+)" cy="([\d.]+)"', svg)
    assert [at_x(a) for a, _ in places] == pytest.approx([10, 11, 15], abs=0.05)
    assert [at_y(b) for _, b in places] == pytest.approx([90, 92, 80], abs=0.1)
    ((a, b),) = re.findall(r'"marker c0" transform="translate\(([\d.]+) ([\d.]+)\)', svg)
    assert (at_x(a), at_y(b)) == pytest.approx((10.5, 91), abs=0.1)
    ((left, height, right),) = re.findall(r'interval c0" d="M([\d.]+) ([\d.]+)H([\d.]+)"', svg)
    assert (at_x(left), at_y(height), at_x(right)) == pytest.approx((x.low, y.mean, x.high), abs=0.1)
    ((middle, low, high),) = re.findall(r'interval c0" d="M([\d.]+) ([\d.-]+)V([\d.-]+)"', svg)
    assert (at_x(middle), at_y(low), at_y(high)) == pytest.approx((x.mean, y.low, y.high), abs=0.1)
    assert svg.count("interval c0") == 2 and "interval c1" not in svg and "nan" not in svg
    assert [text for text in re.findall(r'class="number"[^>]*>(\d)', svg)] == ["1", "2"]


def test_numbers_of_arms_at_the_same_place_stand_apart():
    alike = [charts.Cloud(i, [(10.0, 90.0)], stats.summarize([10.0]), stats.summarize([90.0])) for i in (1, 2, 3)]
    svg = charts.scatter("x", "t", "d", ("s", "%"), alike)
    assert len(set(re.findall(r'class="number" x="([\d.]+)" y="([\d.]+)"', svg))) == 3


def test_curves_show_the_mean_of_the_finished_runs_and_every_run():
    svg = re.search(
        r'<svg [^>]*aria-labelledby="accuracy-1-t".*?(?=<svg [^>]*role)',
        html_of(MIXED),
        re.DOTALL,
    )[0]
    at, *_ = axis(svg, "y")
    ys = [at(y) for y in re.findall(r'<circle class="dot test" cx="[\d.]+" cy="([\d.]+)"', svg)]
    means = [stats.summarize([100 * r.epochs[i].test_accuracy for r in MIXED[:3]]).mean for i in (0, 1)]
    assert ys == pytest.approx(means, abs=0.3)
    assert (
        svg.count('"seed test"') == 4 and svg.count('"end test"') == 1
    )  # three finished, one diverged; one has no epoch
    assert f"Test: {means[0]:.4g} after epoch 1, {means[1]:.4g} after epoch 2" in svg


def test_the_loss_of_a_diverged_run_does_not_set_the_scale():
    wild = tuple(epoch._replace(train_loss=1e9, test_loss=math.inf) for epoch in MIXED[0].epochs)
    pages = [html_of([*MIXED[:3], *more]) for more in ([], [record(baseline, 3, "diverged", epochs=wild)])]
    without, with_it = (re.findall(r'class="tick"[^>]*>([^<]+)', text) for text in pages)
    assert without == with_it and pages[1].count('"end training"') == 2  # accuracy and loss


@pytest.mark.parametrize("low, high", [(0, 0), (94.1, 94.4), (5, 5.00001), (-3, 8), (0, 1e11), (96.6, 96.6)])
def test_ticks_are_few_even_and_hold_the_range(low, high):
    marks = charts.ticks(low, high)
    assert marks[0] <= low + 1e-9 and marks[-1] >= high - 1e-9 and 2 <= len(marks) <= 8
    steps = [b - a for a, b in zip(marks, marks[1:], strict=False)]
    assert steps == pytest.approx([steps[0]] * len(steps))


@pytest.mark.parametrize("low, high", [(0.08, 16), (2.2, 2.5), (1, 1), (1e-9, 1e-9), (0.5, 2.31)])
def test_log_ticks_are_few_and_hold_the_range(low, high):
    marks = charts.log_ticks(low, high)
    assert marks[0] <= low * 1.001 and marks[-1] >= high * 0.999 and 2 <= len(marks) <= 8
    assert marks == sorted(set(marks))


@pytest.mark.parametrize("status", records.STATUSES)
def test_a_hostile_record_adds_no_markup(status):
    data = {"source": "digits", "hash": "d", "train": 1437, "test": 360}
    tame = record(status=status, experiment="other", data=data, conv="onednn", epochs=hostile().epochs)
    pages = [Page(html_of([new, record()])) for new in (hostile(status), tame)]
    names, others = ([(name, sorted(attributes), above) for name, attributes, above in each.elements] for each in pages)
    assert names == others
    text = "".join(pages[0].texts)
    assert "<script>alert(1)</script>" in text and "\x00" not in text and "\u202e" not in text
    text = tables.markdown(tables.ladder(arms_of([hostile(status)]), EXPERIMENTS))
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 10 for line in text.splitlines() if line.startswith("|"))
    assert not re.search(r"(?<!\\)<", text)


def test_numbers_beyond_reason_are_no_results():
    new = [record(seed=seed, accuracy=accuracy) for seed, accuracy in enumerate((0.9, math.nan, 1e200))]
    row = cells(tables.ladder(arms_of(new), EXPERIMENTS)[0], "final")
    assert (row["n"], row["test"]) == ("1 of 3", "90.00 %")
    assert "nan" not in "".join(re.findall(r' d="[^"]*"| c[xy]="[^"]*"', html_of(new)))
    assert 'id="time-0-t"' in html_of([record(seconds=-5.0, accuracy=-2.0)])
    nothing = html_of([record(status="crashed", epochs=())])
    assert (
        nothing.count("No run has finished.") == 2
        and "no accuracy or loss to draw" in nothing
        and "run 0 crashed" in nothing
    )


def test_command(tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    for new in MIXED:
        path = records.write(new, Path("runs"))
    status, out, err = call("report", "--markdown", "sub/tables.md")
    assert (status, err) == (0, "") and "8 records of 3 arms; page in report.html" in out
    parsed = Page(Path("report.html").read_text(encoding="utf-8"))
    assert len(parsed.named("figure")) == 5 and "airbench96" in parsed.texts  # declared in the clone
    assert "| `mine` | 3 |" in Path("sub/tables.md").read_text(encoding="utf-8")
    assert "Each against baseline" in Path("report.html").read_text(encoding="utf-8")
    status, out, _ = call("report", "--against", "final", "--out", "against.html")
    assert status == 0 and "Each against final" in Path("against.html").read_text(encoding="utf-8")
    status, out, _ = call("report", "--against-previous", "--out", "previous.html")
    assert status == 0 and "Each against the arm above it" in Path("previous.html").read_text(encoding="utf-8")
    status, out, _ = call("report", str(path), "runs", str(path.resolve()), "--out", "two.html")
    assert status == 0 and out.startswith("8 records of 3 arms")
    status, out, _ = call("report", str(path), "--out", "one.html")
    assert status == 0 and out.startswith("1 records of 1 arms")


@pytest.mark.parametrize(
    "arguments, expected, told",
    [
        ((), 2, "no records in runs; give the folder"),
        (("nowhere",), 2, "'nowhere' does not exist"),
        (("damaged",), 2, "is not a record of a run"),
        (("good", "--markdown", "report.html"), 2, "--out and --markdown are both report.html"),
        (("good", "--against", "fina"), 2, "--against fina is no arm of these records; they are of final"),
        (("good", "--out", "good"), 2, "'good' is a directory"),
        (("good", "--out", "good/final/file.html/x"), 0, ""),
        (("good", "--out", "file/x.html"), 1, "cannot write file/x.html"),
    ],
)
def test_command_refuses_and_leaves_nothing(tmp_path, monkeypatch, call, arguments, expected, told):
    monkeypatch.chdir(tmp_path)
    records.write(record(), Path("good"))
    Path("damaged/final").mkdir(parents=True)
    Path("damaged/final/x.json").write_text("{}")
    Path("file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    status, _, err = call("report", *arguments)
    assert status == expected and told in err
    assert (sorted(tmp_path.rglob("*")) == before) == bool(expected)


MEASURE = """<script>
addEventListener("load", () => {
  const box = element => element.getBoundingClientRect();
  const over = [...document.querySelectorAll("body *")].filter(
    e => box(e).right > innerWidth + 1 && !e.closest(".scroll") && !e.closest("svg"));
  const cut = [...document.querySelectorAll("svg[role=img]")].flatMap(svg => [...svg.querySelectorAll("text")].filter(
    text => box(text).left < box(svg).left - 1 || box(text).right > box(svg).right + 1).map(text => text.textContent));
  parent.postMessage({width: innerWidth, scroll: document.documentElement.scrollWidth, cut,
    over: over.map(e => e.outerHTML),
    back: getComputedStyle(document.body).backgroundColor,
    figures: [...document.querySelectorAll("figure")].map(e => [box(e).width, box(e).height]),
    charts: [...document.querySelectorAll("svg[role=img]")].map(e => [box(e).width, box(e).height])}, "*");
});
</script>"""


def chromium(path, profile, *options):
    """The page as Chromium leaves it, and what it wrote to its console."""
    switches = (
        "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-sync "
        "disable-component-update enable-logging=stderr virtual-time-budget=5000 dump-dom"
    ).split()
    command = [CHROMIUM, *(f"--{switch}" for switch in switches), f"--user-data-dir={profile}", *options, path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium or Chrome on the PATH")
def test_in_a_browser(tmp_path):
    long = [record(dataclasses.replace(final, name="a_name_" * 12), accuracy=0.7), hostile("crashed")]
    text = html_of([*MIXED, *long])
    path = tmp_path / "page.html"
    path.write_text(text, encoding="utf-8")
    shown, console = chromium(path, tmp_path / "profile")
    assert console == [] and len(Page(shown).named("figure")) == text.count("<figure>") > 0

    # The page allows no script, and a window is not narrower than 500 pixels: a copy is measured inside of frames.
    policy = html.escape(page.POLICY, quote=False)
    assert policy in text
    copy = text.replace(policy, "").replace("</body>", f"{MEASURE}</body>")
    frames = "".join(
        f'<iframe width="{width}" height="900" srcdoc="{html.escape(copy)}"></iframe>' for width in (390, 1280)
    )
    note = "addEventListener('message', e => { found.textContent += JSON.stringify(e.data) + '\\n'; });"
    path.write_text(
        f"<!DOCTYPE html><meta charset=utf-8><pre id=found></pre><script>{note}</script>{frames}", encoding="utf-8"
    )
    shown, console = chromium(path, tmp_path / "profile", "--window-size=1400,1000")
    lines = html.unescape(re.search(r'<pre id="found">(.*?)</pre>', shown, re.DOTALL)[1]).splitlines()
    answers = sorted(map(json.loads, lines), key=lambda answer: answer["width"])
    assert console == [] and [round(answer["width"], -1) for answer in answers] == [390, 1280]
    for answer in answers:
        assert answer["scroll"] <= answer["width"] and answer["over"] == [] and answer["cut"] == []
        assert len(answer["figures"]) == text.count("<figure>") and len(answer["charts"]) == text.count('role="img"')
        assert all(width > 250 and height > 100 for width, height in answer["charts"])
        assert all(width > 250 and height > 15 for width, height in answer["figures"])
        assert answer["back"] == "rgb(255, 255, 255)"
