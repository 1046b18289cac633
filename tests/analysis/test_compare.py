"""Records grouped into arms, what is refused, and the numbers of a comparison against those of stats."""

import json

import pytest
from hypothesis import strategies as st

from fastcifar_jax.analysis import compare as comparison
from fastcifar_jax.analysis import stats
from fastcifar_jax.analysis.compare import Arm, CompareOptions, group_arms, load_arm
from fastcifar_jax.runs import records
from tests.helpers_fuzz import COUNTS, fuzz
from tests.helpers_records import RECORD, with_changes

A = (0.9401, 0.9412, 0.9398, 0.9405)
B = (0.9431, 0.9440, 0.9425, 0.9436)


def make_record(experiment="final", seed=0, value=0.94, **changes):
    result = {**RECORD.result, "tta_accuracy": value, "test_accuracy": value - 0.003}
    return with_changes(RECORD, **{"experiment": experiment, "seed": seed, "result": result, **changes})


def of_length(num_epochs, **changes):
    return {"recipe": {**RECORD.recipe, "num_epochs": num_epochs}, "recipe_hash": f"{num_epochs:012x}", **changes}


def make_arm(name, values, first_seed=0, **changes):
    return Arm(name, tuple(make_record(name, seed, value, **changes) for seed, value in enumerate(values, first_seed)))


def diverged(name, seed):
    return make_record(name, seed, status="diverged", result=None, error="it diverged")


@pytest.mark.parametrize("confidence", [0.95, 0.9999])
def test_verdict_and_runs_follow_the_confidence(confidence):
    """With which a later look of `--until-half-width` is taken: p is 0.0006 here."""
    options = CompareOptions(min_effect=0.1, confidence=confidence)
    [difference] = comparison.compare([make_arm("old", A), make_arm("new", B)], options)["differences"]
    assert 0.0001 < difference["p_value"] < 0.05
    assert difference["verdict"] == ("higher" if confidence == 0.95 else "none shown")
    sds = [stats.summarize([100 * value for value in values]).sd for values in (A, B)]
    assert difference["runs_for_min_effect"] == stats.runs_needed(*sds, 0.1, confidence=confidence)


def test_numbers_are_those_of_stats_in_percentage_points():
    options = CompareOptions(threshold=94.3, equivalence_margin=0.1, min_effect=0.1)
    answer = comparison.compare([make_arm("old", A), make_arm("new", B)], options)
    percent = [[100 * value for value in values] for values in (A, B)]
    [difference] = answer["differences"]
    expected = stats.welch(*percent)
    assert expected.estimate == pytest.approx(0.29, abs=1e-9)
    assert {name: difference[name] for name in expected._fields} == expected._asdict()
    assert (difference["of"], difference["against"], difference["verdict"]) == ("new", "old", "higher")
    assert difference["paired"] == {**stats.paired(*percent)._asdict(), "helps": True}  # seeds move both arms alike
    assert difference["equivalence"] == stats.tost(*percent, 0.1)._asdict()
    sds = [stats.summarize(values).sd for values in percent]
    assert difference["runs_for_observed"] == stats.runs_needed(*sds, expected.estimate)
    assert difference["runs_for_min_effect"] == stats.runs_needed(*sds, 0.1)
    assert [arm["mean"] for arm in answer["arms"]] == [stats.summarize(values).mean for values in percent]
    assert [(arm["share"], arm["values"]) for arm in answer["arms"]] == [(0.0, percent[0]), (0.75, percent[1])]
    seconds = comparison.compare([make_arm("old", A), make_arm("new", B)], CompareOptions(metric="train_seconds"))
    assert seconds["arms"][0]["mean"] == 9.0
    assert json.loads(records.dumps(answer)) == json.loads(json.dumps(answer))


def test_several_arms_are_corrected_and_compared_with_the_first_or_the_previous():
    arms = [make_arm("a", A), make_arm("b", B), make_arm("c", B)]
    first = comparison.compare(arms, CompareOptions())["differences"]
    assert [(d["of"], d["against"]) for d in first] == [("b", "a"), ("c", "a")]
    assert [d["p_holm"] for d in first] == list(stats.holm([d["p_value"] for d in first]))
    previous = comparison.compare(arms, CompareOptions(against_previous=True))["differences"]
    assert [(d["of"], d["against"]) for d in previous] == [("b", "a"), ("c", "b")]


def test_the_verdict_is_at_the_level_of_the_interval_and_corrected():
    old, new, same = make_arm("old", A), make_arm("new", (0.9408, 0.9421, 0.9411, 0.9415)), make_arm("same", A)
    verdicts = lambda arms, c: [
        d["verdict"] for d in comparison.compare(arms, CompareOptions(confidence=c))["differences"]
    ]
    [p_value] = [d["p_value"] for d in comparison.compare([old, new], CompareOptions())["differences"]]
    for confidence, verdict in ((1 - 1.01 * p_value, "higher"), (1 - 0.99 * p_value, "none shown")):
        assert verdicts([old, new], confidence) == [verdict]
    assert verdicts([new, old], 1 - 1.01 * p_value) == ["lower"]
    assert verdicts([old, new, same], 1 - 1.01 * p_value) == ["none shown"] * 2
    assert verdicts([old, new, same], 1 - 2.02 * p_value) == ["higher", "none shown"]


def test_a_diverged_run_is_counted_and_reaches_no_threshold():
    losing = Arm("new", (*make_arm("new", B).records, diverged("new", 4)))
    answer = comparison.compare([make_arm("old", A), losing], CompareOptions(threshold=94.0))
    found = answer["arms"][1]
    assert (found["n"], found["diverged"], found["share"]) == (4, 1, 4 / 5)
    assert found["seeds"] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("first_seed", "pairs"), [(1, 3), (2, None), (9, None)])
def test_pairs_are_of_common_seeds(first_seed, pairs):
    arms = [make_arm("old", A), make_arm("new", B, first_seed)]
    [difference] = comparison.compare(arms, CompareOptions())["differences"]
    assert (difference["paired"] or {"n": None})["n"] == pairs


@pytest.mark.parametrize(("others", "count"), [((make_record(),), "1 finished run"), ((), "no finished runs")])
def test_too_few_finished_runs(others, count):
    arms = [make_arm("old", A), Arm("new", (*others, diverged("new", 1)))]
    with pytest.raises(ValueError, match=f"new has {count}; a comparison needs at least 2"):
        comparison.compare(arms, CompareOptions())


def test_runs_on_other_images_are_refused():
    comparison.check_comparable([make_arm("old", A), make_arm("new", B)])
    for name, value, said in (("hash", "another", "hash another"), ("train", 9, "9 train"), ("test", 5, "5 test")):
        with pytest.raises(ValueError, match=f"saw different images.*{said}.*--allow-different-data"):
            comparison.check_comparable([make_arm("old", A), make_arm("new", B, data={name: value})])


def test_groups_are_named_and_ordered():
    data = {"source": "digits", "train": 1437}
    found = [
        *(make_record("b", seed, **of_length(length)) for length in (8, 4) for seed in (1, 0)),
        *(make_record("a", recipe_hash=letter * 12) for letter in "dc"),
        make_record("c"), make_record("c", data=data), make_record("c", framework="torch"),
    ]  # fmt: skip
    arms = group_arms(found)
    names = ["b, 4 epochs", "b, 8 epochs", "a@cccccccc", "a@dddddddd", "c on digits, 1,437 images",
             "c on cifar10, 50,000 images", "torch:c"]  # fmt: skip
    assert [arm.name for arm in arms] == names
    assert [record.seed for record in arms[0].records] == [0, 1]
    assert sorted(map(repr, found)) == sorted(repr(record) for arm in arms for record in arm.records)
    assert [arm.name for arm in group_arms(found, ["c", "a"])] == [*names[4:], *names[2:4], *names[:2]]


def test_the_newest_finished_record_of_a_seed_counts():
    old, new = (make_record(started=f"2026-01-0{day}") for day in (1, 2))
    failed = with_changes(diverged("final", 0), started="2026-01-03")
    for found in ([new, failed, old], [old, failed, new]):
        [arm] = group_arms(found)
        assert arm.records == (new,) and {record.started[-1] for record in arm.repeats} == {"1", "3"}


def test_load_arm(tmp_path):
    for record in (*make_arm("final", A).records, make_record("final", 9, framework="torch"), make_record("other")):
        records.write(record, tmp_path)
    assert [record.seed for record in load_arm(tmp_path, "final").records] == [0, 1, 2, 3]
    assert [record.seed for record in load_arm(tmp_path, "torch:final").records] == [9]
    with pytest.raises(ValueError, match="no record of nothing in .*; --seeds 5 makes them"):
        load_arm(tmp_path, "nothing")
    with pytest.raises(ValueError, match="no record of final"):
        load_arm(tmp_path, "final", train=20_000)
    records.write(make_record(**of_length(5)), tmp_path)
    with pytest.raises(ValueError, match="holds 2 recipes called final: .*@00000000 has num_epochs 5.*final@00000000"):
        load_arm(tmp_path, "final")
    [record] = load_arm(tmp_path, "final@0000").records
    assert record.recipe["num_epochs"] == 5
    path = records.write(make_record("other", data={"hash": "another", "train": 9}), tmp_path)
    with pytest.raises(ValueError, match="runs of other on different images: .* 9 training.*choose with --data"):
        load_arm(tmp_path, "other")
    path.with_name("copy.json").write_text(path.read_text())
    with pytest.raises(ValueError, match="more than one record of other, seed 0"):
        load_arm(tmp_path, "other", train=9)


def test_parse_arm():
    assert comparison.parse_arm("final") == comparison.parse_arm("jax:final") == ("jax", "final", "")
    assert comparison.parse_arm("torch:my/trick.py@1a2b") == ("torch", "my/trick.py", "1a2b")
    for text in ("", "final@xyz", "@12"):
        with pytest.raises(ValueError, match="is not an arm; give an experiment's name"):
            comparison.parse_arm(text)


@pytest.mark.parametrize("count", COUNTS)
def test_any_arm(count):
    def body(text):
        try:
            framework, experiment, prefix = comparison.parse_arm(text)
        except ValueError as error:
            assert "is not an arm" in str(error)
            return
        assert framework in ("jax", "torch") and experiment and "@" not in experiment
        assert set(prefix) <= set("0123456789abcdef")
        assert text.endswith(f"{experiment}@{prefix}" if prefix else experiment)

    pieces = st.sampled_from(("jax", "torch", ":", "@", "final", "*", ".py", "1a2b", "\n", "\0", "\ud800"))
    fuzz(count, st.lists(pieces | st.text(max_size=5), max_size=6).map("".join), body)
