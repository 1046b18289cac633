"""Figures of records are drawn where the numbers are."""

import math

import numpy as np
import pytest

from fastcifar_jax.analysis import stats
from fastcifar_jax.report import plot_data, run_figures
from fastcifar_jax.report.tables import arms_of
from fastcifar_jax.runs import records
from tests.helpers_page import DIGITS, MIXED, record


def points_of(axis):
    """Every line of an axis as an array of points."""
    return [np.array(line.get_data(), float).T for line in axis.get_lines() if len(line.get_data()[0])]


def bars_of(axis):
    """Ends of the error bars, an array per container."""
    return [[np.array(bar.get_segments()) for bar in container.lines[2]] for container in axis.containers]


def drawn(axis, points):
    return any(line.shape == np.shape(points) and np.allclose(line, points) for line in points_of(axis))


def runs_of_lengths():
    accuracies = {
        "final_e2": (0.5, 0.53, 0.51),
        "final_e4": (0.6, 0.61, 0.66),
        "old_e2": (0.4, 0.42),
        "old_e4": (0.55,),
    }
    values = lambda name: {"num_epochs": int(name[-1]), "optim.peak_lr": 0.4 if name[0] == "f" else 0.8}
    found = [
        record(seed=seed, accuracy=value, experiment=name, recipe_hash=name, recipe=values(name))
        for name, numbers in accuracies.items()
        for seed, value in enumerate(numbers)
    ]
    lost = record(seed=1, status="diverged", experiment="old_e4", recipe_hash="old_e4", recipe=values("old_e4"))
    return [*found, lost], accuracies


def test_convergence_shows_every_run_and_the_intervals():
    found, accuracies = runs_of_lengths()
    series = plot_data.lengths_of(arms_of(found))
    assert {name: list(arms) for name, arms in series.items()} == {"final": [2, 4], "old": [2, 4]}
    figure = run_figures.convergence(series)
    for axis, extra in zip(figure.axes, (0, 1), strict=True):
        for container, name in zip(axis.containers, series, strict=True):
            line, _, [bars] = container.lines
            means, ends = [], []
            for epochs in (2, 4):
                summary = stats.summarize([100 * value + extra for value in accuracies[f"{name}_e{epochs}"]])
                single = summary.n == 1
                means.append(summary.mean)
                ends.append((summary.mean, summary.mean) if single else (summary.low, summary.high))
            np.testing.assert_allclose(line.get_xydata().T, ([2, 4], means))
            np.testing.assert_allclose([segment[:, 1] for segment in bars.get_segments()], ends)
        points = {(x, round(y, 6)) for line in points_of(axis) for x, y in line}
        assert {(int(n[-1]), round(100 * v + extra, 6)) for n, values in accuracies.items() for v in values} <= points
    assert figure.axes[0].get_legend_handles_labels()[1] == ["final (n = 3)", "old (n = 1 to 2, 1 diverged)"]


def test_lengths_of_keeps_other_recipes_apart():
    run = lambda name, epochs, lr=0.4: record(
        experiment=name, recipe={"num_epochs": epochs, "optim.peak_lr": lr}, recipe_hash=f"{name}{epochs}" + "0" * 8
    )
    found = plot_data.lengths_of(arms_of([run("final_e3", 3), run("final_e9", 9, 0.1)]))
    assert list(found) == ["final", "final@final_e9"]
    with pytest.raises(ValueError, match="a and b both have 3 epochs"):
        plot_data.lengths_of(arms_of([run("a", 3), run("b", 3)]))


def test_curves_show_every_run_and_the_mean():
    found = [record(seed=seed, accuracy=0.5 + 0.01 * seed, num_epochs=4) for seed in range(3)]
    found += [record(experiment="old", accuracy=0.4), record(seed=1, status="crashed", experiment="old")]
    figure = run_figures.curves(arms_of(found))
    for axis, column in zip(figure.axes, ("train_accuracy", "test_accuracy", "train_loss", "test_loss"), strict=True):
        scale = 100 if "accuracy" in column else 1
        assert axis.get_legend_handles_labels()[1] == ["final (n = 3)", "old (n = 1, 1 crashed)"]
        for runs in (found[:3], found[3:4]):
            rows = [[(row.epoch, scale * getattr(row, column)) for row in run.epochs] for run in runs]
            assert drawn(axis, np.mean(rows, axis=0)) and all(drawn(axis, row) for row in rows)
        assert sum(len(line) == 2 for line in points_of(axis)) == 2  # a run and its mean; not the crashed one
    labels = ["training accuracy (%)", "test accuracy (%)", "training loss (nats per image)"]
    assert [axis.get_ylabel() for axis in figure.axes][:3] == labels


def test_curves_of_an_arm_have_crosses_where_runs_ended_early():
    baseline = next(arm for arm in arms_of(MIXED) if arm.name == "baseline")
    shown = run_figures.arm_curves(baseline)
    accuracy, loss = run_figures.curves_by_epoch(shown, run_figures.limits_of([shown])).axes
    runs = [[(row.epoch, 100 * row.test_accuracy) for row in run.epochs] for run in MIXED[:4]]
    assert all(drawn(accuracy, run) for run in runs) and drawn(accuracy, np.mean(runs[:3], axis=0))
    crosses = [line for line in accuracy.get_lines() if line.get_marker() == "x"]
    np.testing.assert_allclose(crosses[0].get_xydata(), runs[3][-1:])
    assert len(crosses) == 2  # test and training of the diverged run; the crashed one has no epoch
    assert drawn(loss, [(row.epoch, row.train_loss) for row in MIXED[0].epochs])


def test_the_loss_of_a_diverged_run_does_not_set_the_scale():
    wild = tuple(epoch._replace(train_loss=1e9, test_loss=math.inf) for epoch in MIXED[0].epochs)
    lost = record(seed=3, status="diverged", epochs=wild)
    limits = [
        run_figures.limits_of([run_figures.arm_curves(*arms_of(found))])
        for found in ([record()], [record(), lost], [lost])
    ]
    assert limits[0] == limits[1] and limits[0]["loss"] == (0.75, 2.0)
    assert limits[2]["loss"] == (1e9, 1e9)  # the only scale there is


def test_accuracy_over_seeds():
    values = (90.0, 91.0, 92.5, 92.5)
    [arm] = arms_of([record(seed=seed, accuracy=value / 100 - 0.01) for seed, value in enumerate(values)])
    [single] = arms_of([record(experiment="single", accuracy=0.92)])
    [axis] = run_figures.accuracy_over_seeds([(1, arm), (7, single)]).axes
    found = stats.summarize(values)
    np.testing.assert_allclose(points_of(axis)[0][:, 0], values)
    assert len({tuple(point) for point in points_of(axis)[0].round(6)}) == 4  # equal runs stay apart
    assert drawn(axis, [(found.mean, 0.38)])
    np.testing.assert_allclose(bars_of(axis)[0][0][0][:, 0], (found.low, found.high))
    assert bars_of(axis)[1] == []  # a single run has no interval
    low, high = axis.get_xlim()
    assert low <= found.low and high >= found.high
    assert [text.get_text() for text in axis.texts] == ["1  final (n = 4)", "7  single (n = 1)"]


def test_time_against_accuracy():
    runs = [record(seed=seed, seconds=10.0 + seed, accuracy=0.89 + 0.02 * seed) for seed in range(2)]
    [arm], [single] = arms_of(runs), arms_of([record(experiment="single", seconds=15.0, accuracy=0.79)])
    absurd = record(seed=3, accuracy=1e200)
    [with_absurd] = arms_of([*runs, absurd])
    for shown in (arm, with_absurd):
        [axis] = run_figures.time_against_accuracy([(1, shown), (2, single)]).axes
        assert drawn(axis, [(10, 90), (11, 92)]) and drawn(axis, [(15, 80)]) and drawn(axis, [(10.5, 91)])
        x, y = stats.summarize([10.0, 11.0]), stats.summarize([90.0, 92.0])
        np.testing.assert_allclose(bars_of(axis)[0][0][0], ((x.low, 91), (x.high, 91)))
        np.testing.assert_allclose(bars_of(axis)[0][1][0], ((10.5, y.low), (10.5, y.high)))
        assert bars_of(axis)[1] == [] and [text.get_text() for text in axis.texts] == ["1", "2"]
        assert axis.get_ylim()[1] < 106 and axis.get_xlim()[0] >= -2  # the intervals leave the frame


def test_numbers_of_arms_at_the_same_place_stand_apart():
    [arm] = arms_of([record()])
    [axis] = run_figures.time_against_accuracy([(i, arm) for i in (1, 2, 3, 4)]).axes
    assert len({text.xyann for text in axis.texts}) == 4


def test_runs_are_read_from_folders_and_files(tmp_path):
    kept = [records.write(record(seed=seed), tmp_path / "runs") for seed in range(2)]
    for paths in ([tmp_path / "runs"], [tmp_path / "runs" / "final"], [kept[0], kept[1], tmp_path / "runs"]):
        assert [[run.seed for run in arm.records] for arm in plot_data.read_arms(paths)] == [[0, 1]]
    with pytest.raises(ValueError, match="no records in .*nowhere"):
        plot_data.read_arms([tmp_path / "nowhere"])
    records.write(record(seed=5, data=DIGITS), tmp_path / "copy")
    with pytest.raises(ValueError, match=r"saw different images: .*cifar10, 50,000.*digits, 1,437"):
        plot_data.read_arms([tmp_path / "runs", tmp_path / "copy"])
