"""Comparisons of records: what is read, what is refused, and the numbers against stats."""

import io
import json

import pytest
from rich.console import Console

from fastcifar_jax.analysis import compare as comparison
from fastcifar_jax.analysis import stats
from fastcifar_jax.analysis.compare import Arm, CompareOptions
from fastcifar_jax.runs import records
from tests.helpers_records import RECORD, with_changes

A = (0.9401, 0.9412, 0.9398, 0.9405)
B = (0.9431, 0.9440, 0.9425, 0.9436)


def make_record(experiment="final", seed=0, value=0.94, **changes):
    result = {**RECORD.result, "tta_accuracy": value, "test_accuracy": value - 0.003}
    return with_changes(RECORD, **{"experiment": experiment, "seed": seed, "result": result, **changes})


def arm(name, values, **changes):
    return Arm(name, tuple(make_record(name, seed, value, **changes) for seed, value in enumerate(values)))


def diverged(name, seed):
    return make_record(name, seed, status="diverged", result=None, error="it diverged")


def shown(answer):
    console = Console(file=io.StringIO(), width=200)
    comparison.show(answer, console)
    return console.file.getvalue()


def test_numbers_are_those_of_stats_in_points():
    answer = comparison.compare(
        [arm("old", A), arm("new", B)], CompareOptions(threshold=94.3, equivalence_margin=0.1, min_effect=0.1)
    )
    points = [[100 * value for value in values] for values in (A, B)]
    [difference] = answer["differences"]
    expected = stats.welch(*points)
    assert expected.estimate == pytest.approx(0.29, abs=1e-9)
    assert {name: difference[name] for name in expected._fields} == expected._asdict()
    assert (difference["of"], difference["against"]) == ("new", "old")
    assert difference["paired"] == {**stats.paired(*points)._asdict(), "helps": True}  # the seeds move both alike
    assert difference["equivalence"] == stats.tost(*points, 0.1)._asdict()
    sds = [stats.summarize(values).sd for values in points]
    assert difference["runs_for_observed"] == stats.runs_needed(*sds, expected.estimate)
    assert difference["runs_for_min_effect"] == stats.runs_needed(*sds, 0.1)
    assert [a["mean"] for a in answer["arms"]] == [stats.summarize(values).mean for values in points]
    assert [a["share"] for a in answer["arms"]] == [0.0, 0.75]
    assert json.loads(records.dumps(answer)) == json.loads(json.dumps(answer))


def test_what_is_shown():
    text = shown(comparison.compare([arm("old", A), arm("new", B)], CompareOptions(equivalence_margin=0.1)))
    assert "tta accuracy: mean and 95 % interval" in text and "94.04" in text and "+0.29" in text
    assert "new against old: higher, by +0.29 points" in text and "not shown to be equivalent within 0.1" in text
    text = shown(comparison.compare([arm("old", A), arm("same", A)], CompareOptions(equivalence_margin=0.1)))
    assert "no difference shown" in text and "; equivalent within 0.1" in text


def test_several_arms_are_corrected_and_compared_with_the_first_or_the_previous():
    arms = [arm("a", A), arm("b", B), arm("c", B)]
    first = comparison.compare(arms, CompareOptions())["differences"]
    assert [(d["of"], d["against"]) for d in first] == [("b", "a"), ("c", "a")]
    assert [d["p_holm"] for d in first] == list(stats.holm([d["p_value"] for d in first]))
    previous = comparison.compare(arms, CompareOptions(against_previous=True))["differences"]
    assert [(d["of"], d["against"]) for d in previous] == [("b", "a"), ("c", "b")]


def test_a_diverged_run_is_counted_and_reaches_no_threshold():
    losing = Arm("new", (*arm("new", B).records, diverged("new", 4)))
    answer = comparison.compare([arm("old", A), losing], CompareOptions(threshold=94.0))
    found = answer["arms"][1]
    assert (found["n"], found["diverged"], found["share"]) == (4, 1, 4 / 5)
    assert found["seeds"] == [0, 1, 2, 3, 4]
    assert "1 runs have no result" in shown(answer)


def test_pairs_are_of_common_seeds():
    shifted = Arm("new", tuple(make_record("new", seed, value) for seed, value in enumerate(B, start=1)))
    [difference] = comparison.compare([arm("old", A), shifted], CompareOptions())["differences"]
    assert difference["paired"]["n"] == 3
    apart = Arm("new", tuple(make_record("new", seed, value) for seed, value in enumerate(B, start=9)))
    [difference] = comparison.compare([arm("old", A), apart], CompareOptions())["differences"]
    assert difference["paired"] is None


def test_other_metrics_keep_their_unit():
    answer = comparison.compare([arm("old", A), arm("new", B)], CompareOptions(metric="train_seconds"))
    assert answer["arms"][0]["mean"] == 9.0


def test_one_finished_run_is_too_few():
    with pytest.raises(ValueError, match="new has 1 finished run; a comparison needs at least 2"):
        comparison.compare([arm("old", A), Arm("new", (make_record("new"), diverged("new", 1)))], CompareOptions())


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"hash": "another"}, "hash another"),
        ({"train": 20_000}, "20,000 training"),
        ({"test": 5_000}, "5,000 test images"),
    ],
)
def test_runs_on_other_images_are_refused(data, said):
    other = arm("new", B, data=data)
    with pytest.raises(ValueError, match=f"saw different images.*{said}.*--allow-different-data"):
        comparison.check_comparable([arm("old", A), other])
    comparison.check_comparable([arm("old", A), arm("new", B)])


def test_two_records_of_a_seed_are_refused():
    with pytest.raises(ValueError, match="more than one record of a seed"):
        comparison.check_comparable([Arm("old", (make_record("old"), make_record("old")))])


def test_arms_on_file(tmp_path):
    for record in (*arm("final", A).records, make_record("final", 9, framework="torch"), make_record("other")):
        records.write(record, tmp_path)
    assert [record.seed for record in comparison.load_arm(tmp_path, "final").records] == [0, 1, 2, 3]
    assert [record.seed for record in comparison.load_arm(tmp_path, "torch:final").records] == [9]
    with pytest.raises(ValueError, match="no record of nothing in .*; --seeds 5 makes them"):
        comparison.load_arm(tmp_path, "nothing")
    with pytest.raises(ValueError, match="no record of final"):
        comparison.load_arm(tmp_path, "final", train=20_000)


def test_several_recipes_of_one_name_must_be_told_apart(tmp_path):
    narrow = {**RECORD.recipe, "num_epochs": 5}
    records.write(make_record(), tmp_path)
    records.write(make_record(recipe=narrow, recipe_hash="feed5eed0123"), tmp_path)
    with pytest.raises(ValueError, match="holds 2 recipes called final: .*@feed5eed has num_epochs 5.*final@feed5eed"):
        comparison.load_arm(tmp_path, "final")
    [record] = comparison.load_arm(tmp_path, "final@feed").records
    assert record.recipe["num_epochs"] == 5


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("final", ("jax", "final", "")),
        ("torch:final", ("torch", "final", "")),
        ("jax:my/trick.py", ("jax", "my/trick.py", "")),
        ("final@1a2b", ("jax", "final", "1a2b")),
    ],
)
def test_parse_arm(text, parts):
    assert comparison.parse_arm(text) == parts


@pytest.mark.parametrize("text", ["", "final@xyz", "@12"])
def test_no_arm(text):
    with pytest.raises(ValueError, match="is no arm; write an experiment's name"):
        comparison.parse_arm(text)
