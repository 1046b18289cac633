"""Records for reports and plots, some of them hostile, and a parser of pages."""

import dataclasses
import json
import math
from html.parser import HTMLParser
from pathlib import Path

from experiments.bag_of_tricks import baseline, celu, final
from fastcifar_jax.recipe import change, to_dict
from fastcifar_jax.report import html as page
from fastcifar_jax.report import tables
from fastcifar_jax.runs import records
from fastcifar_jax.runs.experiments import Experiment
from fastcifar_jax.types import EpochInfo
from tests.helpers_records import PROVENANCE, with_changes

EXPERIMENTS = [
    Experiment(recipe, None, Path("ladder.py"), "ladder: three steps", None, True) for recipe in (baseline, celu, final)
]
DIGITS = {"source": "digits", "hash": "d", "train": 1437, "test": 360}
VOID = {"meta", "link", "img", "br", "hr", "input"}
NASTY = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>|`*_\\ \x00\u202e &amp; " + "\u6f22" * 600


def record(base=final, seed=0, status="finished", accuracy=0.9, seconds=10.0, num_epochs=2, **changes):
    """A run of a recipe that reaches `accuracy` in the last epoch, and 0.01 less per epoch before."""
    base = change(base, (), None, None, "float32")
    epochs = tuple(
        EpochInfo(i, seconds / num_epochs, 2.0 / i, at - 0.1, 1.5 / i, at, 1.4 / i, at + 0.01)
        for i, at in ((i, accuracy - 0.01 * (num_epochs - i)) for i in range(1, num_epochs + 1))
    )
    numbers = {"test_accuracy": accuracy, "tta_accuracy": accuracy + 0.01, "train_seconds": seconds}
    result = {name: 1.0 for name in records.RESULT} | numbers
    fields = {
        "experiment": base.name,
        "framework": "jax",
        "recipe": json.loads(records.dumps(to_dict(base))),
        "recipe_repr": repr(base),
        "recipe_hash": base.hash,
        "seed": seed,
        "status": status,
        "error": None if status == "finished" else f"run {seed} {status}",
        "provenance": PROVENANCE,
        "command": ("run", base.name),
        "started": f"2026-01-01T00:00:0{seed}+00:00",
        "epochs": epochs,
        "result": result if status == "finished" else None,
    }
    own = {name: changes.pop(name) for name in fields.keys() & changes.keys()}
    return with_changes(records.Record(**fields | own), **{"versions": {"jax": "0.10"}, **changes})


def html_of(found):
    arms = tables.arms_of(found, EXPERIMENTS)
    return page.html(arms, tables.ladder(arms, EXPERIMENTS), tables.differences(arms))


MIXED = [
    *(record(baseline, seed, accuracy=0.90 + 0.01 * seed, seconds=20 + seed) for seed in range(3)),
    record(baseline, 3, "diverged"),
    record(baseline, 4, "crashed", epochs=()),
    *(record(final, seed, accuracy=0.92 + 0.005 * seed) for seed in range(2)),
    record(dataclasses.replace(final, name="mine", num_epochs=3), accuracy=0.8),
]


class Page(HTMLParser):
    """The elements of a page as `(name, attributes, ancestors)`, and the text that each holds itself."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), [self.elements[i][0] for i in self.open]))
        self.texts.append("")
        if tag not in VOID:
            self.open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.elements[self.open.pop()][0] == tag

    def handle_data(self, data):
        for i in self.open:
            self.texts[i] += data

    def named(self, tag):
        return [
            (attributes, text)
            for (name, attributes, _), text in zip(self.elements, self.texts, strict=True)
            if name == tag
        ]


def cells(table, name):
    """The row of a table as a dict."""
    row = next(row for row in table.rows if row[0] == name)
    return dict(zip(table.columns, row, strict=True))


def hostile(status="finished"):
    """A record that `records.read` lets through, and nobody would write."""
    wild = EpochInfo(1e300, math.nan, -5.0, 1e300, 1e-320, math.nan, math.inf, 1e15)
    return with_changes(
        record(status=status),
        experiment=NASTY,
        framework=NASTY,
        recipe={NASTY: NASTY, "num_epochs": [NASTY], "compute_dtype": {NASTY: NASTY}},
        recipe_hash=NASTY,
        error=NASTY,
        data={"source": NASTY, "hash": NASTY, "train": -(10**400), "test": 0},
        device={"kind": NASTY, "platform": "gpu", "count": [NASTY], "cpu": NASTY, "cores": NASTY},
        versions={NASTY: NASTY},
        source_hash=NASTY,
        conv=NASTY,
        command=(NASTY, NASTY),
        started=f"z{NASTY}",  # the newest
        mesh=NASTY,
        epochs=(wild, wild._replace(epoch=-3, train_accuracy=-7.0, test_accuracy=0.5, train_loss=2.0, test_loss=3.0)),
    )
