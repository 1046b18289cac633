"""The tables of `report` agree with the records."""

import dataclasses
import json

import pytest

from experiments.bag_of_tricks import baseline, celu, final
from fastcifar_jax.analysis import stats
from fastcifar_jax.recipe import Published, to_dict
from fastcifar_jax.report import tables
from fastcifar_jax.report.tables import arms_of
from fastcifar_jax.runs import records
from tests.helpers_page import DIGITS, EXPERIMENTS, MIXED, Page, cells, html_of, record
from tests.helpers_records import with_changes

ARMS = arms_of(MIXED, EXPERIMENTS)


def test_ladder_has_published_and_measured_side_by_side():
    ladder, undeclared = tables.ladder(ARMS, EXPERIMENTS)
    row = cells(ladder, "baseline")
    assert (row["published"], row["published time"], row["n"]) == ("94.1 %", "75 s, V100", "3 of 5")
    found = stats.summarize([90.0, 91.0, 92.0])
    assert row["test"] == f"{found.mean:.2f} % ({found.low:.2f} to {found.high:.2f})"
    found = stats.summarize([20.0, 21.0, 22.0])
    assert row["training time"] == f"{found.mean:.1f} s ({found.low:.1f} to {found.high:.1f})"
    assert "Comparable" in row["note"] and "1 diverged. 1 crashed" in row["note"] and "abacus, 2 cores" in row["note"]
    assert cells(ladder, "final")["published"] == "94.1 % TTA"
    assert (cells(undeclared, "mine")["test"], cells(undeclared, "mine")["n"]) == ("80.00 %", "1")


def test_recipes_without_runs_are_listed_on_demand():
    ladder, _ = tables.ladder(ARMS, EXPERIMENTS)
    assert [row[0] for row in ladder.rows] == ["baseline", "final"]
    other = [experiment._replace(title="another ladder") for experiment in EXPERIMENTS[1:2]]
    first, second, undeclared = tables.ladder(ARMS, [*other, *EXPERIMENTS], show_all=True)
    assert [row[0] for row in first.rows] == ["baseline", "celu", "final"]
    celu_row = ("celu", "20", "94.1 %", "52 s, V100", "", "", "", "", "not run")
    assert first.rows[1] == celu_row and second[::2] == ("another ladder", (celu_row,))
    assert [row[0] for row in undeclared.rows] == ["mine"]


@pytest.mark.parametrize(
    "changed, data, told",
    [
        ({}, {}, ""),
        ({"compute_dtype": "float16"}, {}, ""),  # the recipe leaves it to the device
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
        records.dumps(to_dict(dataclasses.replace(final, **{"compute_dtype": "float32"} | changed)))
    ))  # fmt: skip
    note = cells(tables.ladder(arms_of([new]), EXPERIMENTS)[0], "final")["note"]
    assert note.startswith("Not comparable: " if told else "Comparable") and told in note


def test_a_declared_dtype_is_part_of_the_recipe():
    declared = dataclasses.replace(final, compute_dtype="float16")
    assert tables.changes(record(), declared) == ["compute_dtype float32 instead of float16"]


def test_a_recipe_without_published_figures():
    plain = [
        experiment._replace(recipe=dataclasses.replace(experiment.recipe, published=Published()))
        for experiment in EXPERIMENTS
    ]
    (ladder,) = tables.ladder(arms_of([record()]), plain)
    assert [row[0] for row in ladder.rows] == ["final"] and "As declared" in ladder.rows[0][-1]
    assert tables.ladder(arms_of([record(experiment="other")]), plain)[0].caption == "Undeclared recipes"


def test_arms_have_the_order_of_the_experiments_and_names_that_can_be_printed():
    found = [record(experiment="a\x00b"), record(), record(framework="torch"), record(baseline)]
    names = [arm.name for arm in arms_of(found, EXPERIMENTS)]
    assert names == ["baseline", "final", "torch:final", "a\ufffdb"]


def test_differences_are_those_of_compare():
    """Of the arms with two finished runs; the single run of `mine` is left out."""
    (table,) = tables.differences(ARMS)
    assert table.caption == "Each against baseline: cifar10, 50,000 training and 10,000 test images"
    assert [row[:2] for row in table.rows] == [("baseline", "3 of 5"), ("final", "2")]
    assert set(table.rows[0][3:7]) == {""}
    row, found = cells(table, "final"), stats.welch([91.0, 92.0, 93.0], [93.0, 93.5])
    assert row["difference"] == f"{found.estimate:+.2f} ({found.low:+.2f} to {found.high:+.2f})"
    assert (row["p (Holm)"], row["verdict"]) == (f"{found.p_value:.2g}", "none shown")
    assert row["runs to see it"] == str(stats.runs_needed(1.0, 0.5**1.5, 1.25))
    (table,) = tables.differences(ARMS, "final")
    assert [row[0] for row in table.rows] == ["final", "baseline"]
    assert cells(table, "baseline")["difference"].startswith("-1.25 ")


def test_differences_are_of_one_data_set_and_called_by_their_sign():
    runs = lambda recipe, accuracy, count=4, **more: [
        record(recipe, seed, accuracy=accuracy + 0.001 * seed, **more) for seed in range(count)
    ]
    better, worse, first = runs(final, 0.95), runs(celu, 0.9), runs(baseline, 0.92)
    other = [*runs(baseline, 0.9, 2, data=DIGITS), *runs(final, 0.8, 2, data=DIGITS)]
    arms = arms_of([*better, *other, *worse, *first], EXPERIMENTS)
    found = tables.differences(arms)
    names = [[row[0].split()[0] for row in table.rows] for table in found]
    assert sorted(names) == [["baseline", "celu", "final"], ["baseline", "final"]]
    small, large = sorted(found, key=lambda table: len(table.rows))
    assert [row[5] for row in large.rows] == ["", "lower", "higher"] and small.rows[1][5] == "lower"
    large = max(tables.differences(arms, previous=True), key=lambda table: len(table.rows))
    assert [row[3].split()[0] for row in large.rows[1:]] == ["-2.00", "+5.00"] and "above it" in large.caption
    assert tables.differences(arms_of([*better, record(baseline)])) == []
    absurd = [record(baseline, seed, accuracy=1e20 * seed) for seed in range(4)]
    assert tables.differences(arms_of([*better, *absurd])) == []


def test_no_run_is_left_out_of_the_runs():
    repeat = record(final, 0, accuracy=0.1, started="2025-01-01T00:00:00+00:00", versions={"python": "3.12"})
    environments, data, runs = tables.run_tables(arms_of([*MIXED, repeat], EXPERIMENTS))
    assert runs.caption == "Runs: 7 finished, 1 diverged, 1 crashed" and len(runs.rows) == len(MIXED) + 1
    rows = [dict(zip(runs.columns, row, strict=True)) for row in runs.rows]
    assert [row["error"] for row in rows if row["error"]] == ["run 3 diverged", "run 4 crashed"]
    assert sorted({row["environment"] for row in rows}) == [row[0] for row in environments.rows] == ["E1", "E2"]
    assert data.rows == (("D1", "cifar10", "0123456789abcdef", "50,000", "10,000"),)
    assert rows[0]["command"] == "run baseline" and rows[0]["dtype"] == "float32"


def test_markdown_and_the_page_have_the_same_tables():
    found = [*tables.ladder(ARMS, EXPERIMENTS), *tables.differences(ARMS), *tables.run_tables(ARMS)]
    lines = tables.markdown(found).splitlines()
    assert [line for line in lines if line.startswith("**")] == [f"**{table.caption}**" for table in found]
    assert any(line.startswith("| `final` | 10 | 94.1 % TTA | 26 s, V100 | 2 | 92.25 % (") for line in lines)
    assert "| :-- | --: | --: | --: | --: | --: | --: | --: | :-- |" in lines
    assert len([line for line in lines if line.startswith("| ")]) == sum(len(table.rows) + 2 for table in found)
    parsed = Page(html_of(MIXED))
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
