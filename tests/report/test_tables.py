"""What the tables of `report` say equals the records."""

import dataclasses
import json

import pytest

from experiments.bag_of_tricks import baseline, celu, final
from fastcifar_jax.analysis import stats
from fastcifar_jax.recipe import Published, flatten
from fastcifar_jax.report import html as page
from fastcifar_jax.report import tables
from fastcifar_jax.runs import records
from tests.helpers_page import EXPERIMENTS, MIXED, Page, arms_of, cells, html_of, record
from tests.helpers_records import with_changes


def test_ladder_has_published_and_measured_side_by_side():
    ladder, undeclared = tables.ladder(arms_of(MIXED), EXPERIMENTS)
    row = cells(ladder, "baseline")
    assert (row["published"], row["published time"], row["n"]) == ("94.1 %", "75 s, V100", "3 of 5")
    found = stats.summarize([90.0, 91.0, 92.0])
    assert row["test"] == f"{found.mean:.2f} % ({found.low:.2f} to {found.high:.2f})"
    found = stats.summarize([20.0, 21.0, 22.0])
    assert row["training time"] == f"{found.mean:.1f} s ({found.low:.1f} to {found.high:.1f})"
    assert "Comparable" in row["note"] and "1 diverged. 1 crashed" in row["note"] and "abacus, 2 cores" in row["note"]
    assert cells(ladder, "celu") == dict(
        zip(tables.LADDER, ("celu", "20", "94.1 %", "52 s, V100", "", "", "", "", "not run"), strict=True)
    )
    assert cells(ladder, "final")["published"] == "94.1 % TTA"
    assert (cells(undeclared, "mine")["test"], cells(undeclared, "mine")["n"]) == ("80.00 %", "1")


@pytest.mark.parametrize(
    "changed, data, told",
    [
        ({}, {}, ""),
        ({"compute_dtype": "float16"}, {}, ""),  # the recipe leaves it to the machine
        ({"num_epochs": 3}, {}, "num_epochs 3 instead of 10"),
        ({}, {"train": 20_000}, "cifar10, 20,000 training and 10,000 test images"),
        ({}, {"test": 5_000}, "cifar10, 50,000 training and 5,000 test images"),
        ({}, {"source": "digits"}, "digits, 50,000 training and 10,000 test images"),
        ({"model": final.model.with_width(4)}, {}, "model.channels [4, 8, 16, 32] instead of [64, 128, 256, 512]"),
        ({"model": final.model.with_width(4), "batch_size": 64, "tta": None, "loss": None}, {}, "more values"),
    ],
)
def test_only_the_published_recipe_on_the_published_data_is_comparable(changed, data, told):
    new = record()
    new = with_changes(new, data=data, recipe=json.loads(
        records.dumps(flatten(dataclasses.replace(final, **{"compute_dtype": "float32"} | changed)))
    ))  # fmt: skip
    note = cells(tables.ladder(arms_of([new]), EXPERIMENTS)[0], "final")["note"]
    assert note.startswith("Not comparable: " if told else "Comparable") and told in note


def test_a_declared_dtype_is_part_of_the_recipe():
    declared = dataclasses.replace(final, compute_dtype="float16")
    assert tables.changes(record(), declared) == ["compute_dtype float32 instead of float16"]


def test_a_module_without_published_figures_shows_what_was_run():
    plain = [
        experiment._replace(recipe=dataclasses.replace(experiment.recipe, published=Published()))
        for experiment in EXPERIMENTS
    ]
    (ladder,) = tables.ladder(arms_of([record()]), plain)
    assert [row[0] for row in ladder.rows] == ["final"] and "As declared" in ladder.rows[0][-1]
    assert tables.ladder(arms_of([record(experiment="other")]), plain)[0].caption == "Recipes that no module declares"


def test_grouping():
    early, late = record(seed=1, accuracy=0.5), record(seed=1, accuracy=0.6, started="2026-02-01T00:00:00+00:00")
    crashed = record(seed=1, status="crashed", started="2026-03-01T00:00:00+00:00")
    (group,) = arms_of([crashed, late, early, record(seed=0)])
    assert group.arm.records == (record(seed=0), late) and group.repeats == (crashed, early)
    torch = record(framework="torch")
    other = record(dataclasses.replace(final, num_epochs=3))
    digits = record(data={"source": "digits", "hash": "d", "train": 1437, "test": 360})
    assert [group.arm.name for group in arms_of([torch, record(), record(baseline)])] == [
        "baseline",
        "final",
        "torch:final",
    ]
    assert {group.arm.name for group in arms_of([other, record()])} == {
        f"final@{hash_[:8]}" for hash_ in (other.recipe_hash, record().recipe_hash)
    }
    assert {group.arm.name for group in arms_of([record(), digits])} == {
        "final on cifar10, 50,000 images",
        "final on digits, 1,437 images",
    }
    assert len(Page(html_of([record(), digits])).named("figure")) == 2 + 2 + 2


def test_differences_are_those_of_compare():
    """Of the arms with two finished runs; the single run of `mine` is left out."""
    (table,) = tables.differences(arms_of(MIXED))
    assert table.caption == "Each against baseline: cifar10, 50,000 training and 10,000 test images"
    assert [row[:2] for row in table.rows] == [("baseline", "3 of 5"), ("final", "2")]
    assert set(table.rows[0][3:7]) == {""}
    row, found = cells(table, "final"), stats.welch([91.0, 92.0, 93.0], [93.0, 93.5])
    assert row["difference"] == f"{found.estimate:+.2f} ({found.low:+.2f} to {found.high:+.2f})"
    assert (row["p (Holm)"], row["verdict"]) == (f"{found.p_value:.2g}", "none shown")
    assert row["runs to see it"] == str(stats.runs_needed(1.0, 0.5**1.5, 1.25))
    (table,) = tables.differences(arms_of(MIXED), "final")
    assert [row[0] for row in table.rows] == ["final", "baseline"]
    assert cells(table, "baseline")["difference"].startswith("-1.25 ")


def test_differences_are_of_one_data_set_and_called_by_their_sign():
    data = {"source": "digits", "hash": "ab", "train": 1437, "test": 360}
    better = [record(final, seed, accuracy=0.95 + 0.001 * seed) for seed in range(4)]
    other = [
        record(recipe, seed, data=data, accuracy=a) for recipe, a in ((baseline, 0.9), (final, 0.8)) for seed in (0, 1)
    ]
    worse = [record(celu, seed, accuracy=0.9 + 0.001 * seed) for seed in range(4)]
    first = [record(baseline, seed, accuracy=0.92 + 0.001 * seed) for seed in range(4)]
    found = tables.differences(arms_of([*better, *other, *worse, *first]))
    assert [[row[0].split()[0] for row in table.rows] for table in found] == [
        ["baseline", "celu", "final"],
        ["baseline", "final"],
    ]
    assert [row[5] for row in found[0].rows] == ["", "lower", "higher"] and found[1].rows[1][5] == "lower"
    (table, _) = tables.differences(arms_of([*better, *other, *worse, *first]), previous=True)
    assert [row[3].split()[0] for row in table.rows[1:]] == ["-2.00", "+5.00"] and "above it" in table.caption
    assert tables.differences(arms_of([*better, record(baseline)])) == []
    absurd = [record(baseline, seed, accuracy=1e20 * seed) for seed in range(4)]
    assert tables.differences(arms_of([*better, *absurd])) == []


def test_no_run_is_left_out_of_the_runs():
    repeat = record(final, 0, accuracy=0.1, started="2025-01-01T00:00:00+00:00", versions={"python": "3.12"})
    environments, data, runs = tables.run_tables(arms_of([*MIXED, repeat]))
    assert runs.caption == "Runs: 7 finished, 1 diverged, 1 crashed" and len(runs.rows) == len(MIXED) + 1
    rows = [dict(zip(runs.columns, row, strict=True)) for row in runs.rows]
    assert [row["error"] for row in rows if row["error"]] == ["run 3 diverged", "run 4 crashed"]
    assert sorted({row["environment"] for row in rows}) == [row[0] for row in environments.rows] == ["E1", "E2"]
    assert data.rows == (("D1", "cifar10", "0123456789abcdef", "50,000", "10,000"),)
    assert rows[0]["command"] == "run baseline" and rows[0]["dtype"] == "float32"


def test_markdown_has_the_same_tables():
    found = [*tables.ladder(arms_of(MIXED), EXPERIMENTS), *tables.run_tables(arms_of(MIXED))]
    lines = tables.markdown(found).splitlines()
    assert [line for line in lines if line.startswith("**")] == [f"**{table.caption}**" for table in found]
    assert "| `celu` | 20 | 94.1 % | 52 s, V100 |  |  |  |  | not run |" in lines
    assert "| :-- | --: | --: | --: | --: | --: | --: | --: | :-- |" in lines
    assert len([line for line in lines if line.startswith("| ")]) == sum(len(table.rows) + 2 for table in found)
    parsed = Page("".join(page.table_html(table, f"t{i}") for i, table in enumerate(found)))
    shown = [text.replace("\u00a0", " ") for name in ("th", "td") for _, text in parsed.named(name)]
    assert sorted(shown) == sorted(cell for table in found for row in (table.columns, *table.rows) for cell in row)


@pytest.mark.parametrize(
    "text, escaped",
    [
        ("num_epochs", "num_epochs"),
        ("__init__", r"\_\_init\_\_"),
        ("a|b", r"a\|b"),
        ("[x](y)", r"\[x\](y)"),
        ("a\\|b", r"a\\\|b"),
    ],
)
def test_markdown_escapes(text, escaped):
    table = tables.Table("t", ("a", "b"), (("x", text),))
    assert tables.markdown([table]).splitlines()[-1] == f"| `x` | {escaped} |"
