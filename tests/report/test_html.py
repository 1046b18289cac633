"""The page of `report` can be read without script or network, and nothing in a record becomes markup."""

import dataclasses
import html
import json
import math
import re
import shutil
import subprocess

import pytest

from experiments.bag_of_tricks import final
from fastcifar_jax.report import drawing, tables
from fastcifar_jax.runs import records
from tests.helpers_page import DIGITS, EXPERIMENTS, MIXED, Page, cells, hostile, html_of, record

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
TITLES = [
    "Published and measured", "Differences", "Accuracy and loss by epoch", "Accuracy over seeds",
    "Time against accuracy", "Runs, data and environments",
]  # fmt: skip
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


@pytest.fixture(scope="module")
def mixed():
    """The page of `MIXED`."""
    return html_of(MIXED)


def test_page_is_well_formed_alone_and_says_what_it_is(mixed):
    parsed = Page(mixed)
    ids = [attributes["id"] for _, attributes, _ in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes, _ in parsed.elements:
        for name in ("aria-labelledby", "aria-describedby"):
            assert attributes.get(name, ids[0]) in ids
        href, clip = attributes.get("href", f"#{ids[0]}"), attributes.get("clip-path", f"url(#{ids[0]})")
        assert href[0] == "#" and {href[1:], re.fullmatch(r"url\(#(.*)\)", clip)[1]} <= set(ids)
        assert "src" not in attributes and "style" not in attributes
        assert not any(name.startswith("on") for name in attributes)
    names = {name for name, _, _ in parsed.elements}
    assert names >= {"header", "nav", "main", "section", "footer", "title", "h1", "h2"}
    assert not names & {"script", "link", "img", "iframe", "object"}
    [(_, style)] = parsed.named("style")
    assert "url(" not in style and "@import" not in style
    assert any(attributes.get("content") == POLICY for attributes, _ in parsed.named("meta"))
    assert ("html", {"lang": "en"}, []) in parsed.elements and "width=device-width" in str(parsed.named("meta"))
    assert [text for _, text in parsed.named("h2")] == TITLES


def test_every_table_and_figure_can_be_read_aloud(mixed):
    parsed = Page(mixed)
    assert len(parsed.named("table")) == len(parsed.named("caption")) == 6
    assert {attributes["scope"] for attributes, _ in parsed.named("th")} == {"col", "row"}
    images = [attributes for attributes, _ in parsed.named("svg")]
    assert len(images) == 3 + 1 + 1  # the curves of three arms, the seeds, the time
    assert all(attributes["role"] == "img" and "aria-labelledby" in attributes for attributes in images)
    assert len(parsed.named("figure")) == len(parsed.named("figcaption")) == len(parsed.named("desc")) == len(images)
    assert all(text for name in ("title", "desc", "figcaption") for _, text in parsed.named(name))
    [curves] = [text for _, text in parsed.named("desc") if "90 after epoch 1, 91 after epoch 2" in text]
    assert curves.startswith("Test accuracy: ") and "Training loss: 2 after epoch 1, 1 after epoch 2" in curves


def test_colours_stand_out_from_both_backgrounds(mixed):
    def luminance(colour):
        digits = colour * 2 if len(colour) == 3 else colour
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(a, b):
        low, high = sorted((luminance(a), luminance(b)))
        return (high + 0.05) / (low + 0.05)

    schemes = re.findall(r":root \{(.*?)\}", Page(mixed).named("style")[0][1], re.DOTALL)
    assert len(schemes) == 2
    for scheme in schemes:
        colours = dict(re.findall(r"--(\w+): #(\w+)", scheme))
        assert all(contrast(colours[name], colours["back"]) >= 4.5 for name in ("text", "faint"))
        assert all(contrast(colour[1:], colours["back"]) >= 2.9 for colour in drawing.COLOURS)


def test_figures_take_the_colour_of_the_page(mixed):
    figures = re.findall(r"<svg.*?</svg>", mixed, re.DOTALL)
    found = {colour for svg in figures for colour in re.findall(r'(?:fill|stroke)="([^"]*)"', svg)}
    allowed = {colour.lower() for colour in (*drawing.COLOURS, drawing.FAINT)} | {"none", "currentColor"}
    assert found <= allowed and "currentColor" in found


@pytest.mark.parametrize("status", records.STATUSES)
def test_a_hostile_record_adds_no_markup(status):
    tame = record(status=status, experiment="other", data=DIGITS, conv="onednn", epochs=hostile().epochs)
    pages = [Page(html_of([new, record()])) for new in (hostile(status), tame)]
    names, others = ([(name, sorted(attributes), above) for name, attributes, above in each.elements] for each in pages)
    assert names == others
    text = "".join(pages[0].texts)
    assert "<script>alert(1)</script>" in text and "\x00" not in text and "\u202e" not in text
    text = tables.markdown(tables.ladder(tables.arms_of([hostile(status)]), EXPERIMENTS))
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 10 for line in text.splitlines() if line.startswith("|"))
    assert not re.search(r"(?<!\\)<", text)


def test_numbers_beyond_reason_are_not_results():
    new = [record(seed=seed, accuracy=accuracy) for seed, accuracy in enumerate((0.9, math.nan, 1e200))]
    row = cells(tables.ladder(tables.arms_of(new), EXPERIMENTS)[0], "final")
    assert (row["n"], row["test"]) == ("1 of 3", "90.00 %")
    assert "nan" not in "".join(re.findall(r' d="[^"]*"| [xy]="[^"]*"', html_of(new)))
    assert 'id="time-0-t"' in html_of([record(seconds=-5.0, accuracy=-2.0)])
    nothing = html_of([record(status="crashed", epochs=())])
    assert nothing.count("No run has finished.") == 2
    assert "no accuracy or loss to draw" in nothing and "run 0 crashed" in nothing


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

    # The page allows no script, and a window is at least 500 pixels wide: a copy is measured inside frames.
    assert POLICY in text
    copy = text.replace(POLICY, "").replace("</body>", f"{MEASURE}</body>")
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
