import io
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments.airbench import airbench94
from experiments.bag_of_tricks import baseline, final
from fastcifar_jax.analysis import stats
from fastcifar_jax.augment import AlternatingFlip, Cutout, Flip, GroupedSampling
from fastcifar_jax.models.activations import Celu
from fastcifar_jax.optim import Nesterov
from fastcifar_jax.report import figures as plots
from fastcifar_jax.report import plot_data
from fastcifar_jax.runs import experiments as discover
from fastcifar_jax.runs import records
from fastcifar_jax.train import Diverged, make_train
from tests.helpers_cli import train_and_test
from tests.helpers_plot import NORMED, make_record


def lines_of(axis):
    """Label -> x and y of a line."""
    return {line.get_label(): np.array(line.get_data()) for line in axis.get_lines()}


def pictures_of(axis):
    return [image.get_array() for image in axis.get_images()]


@pytest.mark.parametrize("augmentations", [(AlternatingFlip(),), (Cutout(8),), ()])
def test_augmented_images_are_those_of_the_recipe(augmentations):
    dataset = train_and_test()
    recipe = replace(final, augmentations=augmentations, sampling=GroupedSampling(20))
    first, second = plot_data.augmented(recipe, dataset, 8, (1, 2))
    stored = dataset.train_images[:8]
    if augmentations == (AlternatingFlip(),):
        np.testing.assert_array_equal(first, second[:, :, ::-1])
        mirrored = [np.array_equal(a, b[:, ::-1]) for a, b in zip(first, stored, strict=True)]
        as_stored = [np.array_equal(a, b) for a, b in zip(first, stored, strict=True)]
        assert all(np.logical_xor(mirrored, as_stored)) and any(mirrored) and any(as_stored)
    else:
        changed = (first != stored).any(-1).sum((1, 2))
        assert (changed == (64 if augmentations else 0)).all()
        assert np.array_equal(first, second) == (not augmentations)


def test_augmentations_shows_the_images_under_their_classes():
    dataset = train_and_test()
    pictures = plot_data.augmented(replace(final, augmentations=(Flip(),)), dataset, 8, (1, 2))
    figure = plots.augmentations(dataset.train_images[:8], pictures, (1, 2), list("abcdefgh"))
    rows = np.reshape(figure.axes, (3, 8))
    for row, images in zip(rows, (dataset.train_images[:8], *pictures), strict=True):
        for axis, image in zip(row, images, strict=True):
            np.testing.assert_array_equal(pictures_of(axis)[0], image)
    assert [axis.get_title() for axis in rows[0]] == list("abcdefgh")
    assert [row[0].get_ylabel() for row in rows] == ["as stored", "epoch 1", "epoch 2"]


@pytest.mark.parametrize("size", [2, 3])
def test_whitening_shows_numpys_eigenvectors(size):
    noise = np.random.default_rng(0).normal(size=(20, 35, 35, 3))
    near = sum(noise[:, i : i + 32, j : j + 32] for i in range(4) for j in range(4)) * (40, 25, 15) / 4
    images = np.clip(near + 125, 0, 255).astype(np.uint8)
    found = plot_data.eigen_patches(final, train_and_test()._replace(train_images=images), size)

    x = (images - np.array(final.mean)) / final.std
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(1, 2))  # ..., channel, row, column
    rows = np.moveaxis(windows, 3, -1).reshape(-1, size * size * 3)
    eigenvalues, vectors = np.linalg.eigh(rows.T @ rows / (len(rows) - 1))
    np.testing.assert_allclose(found.roots, np.sqrt(eigenvalues[::-1]), rtol=1e-3)
    agreement = np.abs(np.sum(found.vectors.reshape(len(vectors), -1) * vectors.T[::-1], axis=1))
    np.testing.assert_allclose(agreement, 1, atol=1e-3)

    pictures, chart = plots.whitening(found, final).axes
    [line] = chart.get_lines()
    np.testing.assert_allclose(line.get_data(), (np.arange(1, len(vectors) + 1), found.roots))
    drawn = {tuple(image.get_extent()): image.get_array() for image in pictures.get_images()}
    assert len(drawn) == 2 * len(vectors)
    for i, vector in enumerate(found.vectors, start=1):
        for bottom, sign in ((1, 1), (0, -1)):
            expected = np.clip(np.rint(sign * 3 * vector * final.std + final.mean), 0, 255)
            np.testing.assert_array_equal(drawn[i - 0.45, i + 0.45, bottom + 0.05, bottom + 0.95], expected)
    assert [text.get_text() for text in pictures.texts] == [f"{root:.2f}" for root in found.roots]


# Steps and rates of the specification's section 10.
@pytest.mark.parametrize(
    ("recipe", "steps_per_epoch", "rates"),
    [
        (baseline, 97, {1: 0.000824742, 97: 0.08, 485: 0.4, 1000: 0.288225719, 2328: 0.0}),
        (final, 97, {1: 0.005154639, 97: 0.5, 194: 1.0, 485: 0.55, 776: 0.1, 970: 0.1}),
        (airbench94, 48, {0: 11.5 * 0.2, 109: 11.5, 476: 11.5 * 0.07}),
    ],
)
def test_learning_rates_are_the_recipes(recipe, steps_per_epoch, rates):
    found = plot_data.learning_rates(recipe, steps_per_epoch)
    assert len(found.rates) == max(rates) + 1 and found.epochs[-1] == pytest.approx(max(rates) / steps_per_epoch)
    for step, rate in rates.items():
        assert found.rates[step] == pytest.approx(rate, rel=1e-5, abs=1e-7)


def test_schedules_of_one_optimizer_share_a_panel():
    rates = {recipe.name: plot_data.learning_rates(recipe, 48) for recipe in (baseline, final, airbench94)}
    figure = plots.schedules(rates)
    drawn = [lines_of(axis) for axis in figure.axes]
    assert [set(lines) for lines in drawn] == [{"baseline", "final"}, {"airbench94"}]
    for name, line in (drawn[0] | drawn[1]).items():
        np.testing.assert_array_equal(line, (rates[name].epochs, rates[name].rates))
    styles = {(line.get_color(), line.get_linestyle()) for axis in figure.axes for line in axis.get_lines()}
    assert len(styles) == 3


def test_an_optimizer_without_a_schedule_is_refused():
    class Constant:
        def __call__(self, num_epochs, steps_per_epoch, batch_size):
            return Nesterov()(num_epochs, steps_per_epoch, batch_size)

        def __repr__(self):
            return "Constant()"

    with pytest.raises(ValueError, match="Constant has no field `schedule`"):
        plot_data.learning_rates(replace(final, optim=Constant()), 97)


def test_activations_and_slopes():
    values, slopes = plots.activations({"relu": jax.nn.relu, "celu": Celu(0.3)}).axes
    x, y = lines_of(values)["celu"]
    np.testing.assert_allclose(x, np.linspace(-1, 1, 201), atol=1e-6)
    np.testing.assert_allclose(y, np.maximum(x, 0) + np.minimum(0.3 * np.expm1(x / 0.3), 0), atol=1e-6)
    x, slope = lines_of(slopes)["celu"]
    np.testing.assert_allclose(slope, np.where(x < 0, np.exp(x / 0.3), 1), atol=1e-5)
    assert set(np.unique(lines_of(slopes)["relu"][1])) <= {0, 1}


def test_norm_history_is_that_of_the_run(workplace):
    Path("normed.py").write_text(NORMED)
    [experiment] = discover.resolve(("normed.py",), None)
    dataset = jax.tree.map(jnp.asarray, train_and_test(64))
    told = []
    history = plot_data.norm_history(experiment.recipe, 10, dataset, told.append, seed=3)
    run = make_train(experiment.recipe, 10)(jax.random.key(3), dataset)
    assert [row.train_loss for row in told] == [row.train_loss for row in run.epochs]
    last = run.state.params["layer1"]["norm"]
    for found, expected in ((history.scales, last["scale"]), (history.biases, last["bias"])):
        assert set(found) == {"layer1/norm"} and found["layer1/norm"].shape == (3, 4)
        np.testing.assert_array_equal(found["layer1/norm"][-1], expected)
        assert (found["layer1/norm"][0] != found["layer1/norm"][-1]).any()

    figure = plots.norms(history, "title", channels=3)
    for axis, values in zip(figure.axes, (history.scales, history.biases), strict=True):
        drawn = [line.get_data() for line in axis.get_lines()]
        assert len(drawn) == 3
        for channel, (epochs, y) in enumerate(drawn):
            np.testing.assert_array_equal((epochs, y), ([1, 2, 3], values["layer1/norm"][:, channel]))
    fixed = plots.norms(history._replace(scales={}), "title")
    assert [axis.get_ylabel() for axis in fixed.axes] == ["bias of the norm"]


def runs_of_lengths():
    values = {"final_e2": (0.5, 0.53, 0.51), "final_e4": (0.6, 0.61, 0.66), "old_e2": (0.4, 0.42), "old_e4": (0.55,)}
    found = [
        make_record(name, seed, int(name[-1]), value, recipe_hash=f"{name}", recipe=recipe)
        for name, accuracies in values.items()
        for recipe in [{"num_epochs": int(name[-1]), "optim.peak_lr": 0.4 if name[0] == "f" else 0.8}]
        for seed, value in enumerate(accuracies)
    ]
    lost = make_record("old_e4", 1, 4, status="diverged", recipe_hash="old_e4", recipe=found[-1].recipe)
    return [*found, lost], values


def test_convergence_shows_every_run_and_the_intervals():
    found, values = runs_of_lengths()
    series = plot_data.lengths_of(plot_data.arms_of(found))
    assert {name: list(arms) for name, arms in series.items()} == {"final": [2, 4], "old": [2, 4]}
    for axis, extra in zip(plots.convergence(series).axes, (0, 2), strict=True):
        for container, name in zip(axis.containers, series, strict=True):
            line, _, [bars] = container.lines
            means, ends = [], []
            for epochs in (2, 4):
                summary = stats.summarize([100 * value + extra for value in values[f"{name}_e{epochs}"]])
                single = summary.n == 1
                means.append(summary.mean)
                ends.append((summary.mean, summary.mean) if single else (summary.low, summary.high))
            np.testing.assert_allclose(line.get_xydata().T, ([2, 4], means))
            np.testing.assert_allclose([segment[:, 1] for segment in bars.get_segments()], ends)
        points = [line.get_data() for line in axis.get_lines() if line.get_linestyle() == "None"]
        points = {(x, round(y, 6)) for xs, ys in points for x, y in zip(xs, ys, strict=True)}
        expected = {(int(n[-1]), round(100 * v + extra, 6)) for n, found in values.items() for v in found}
        assert expected <= points
    labels = plots.convergence(series).axes[0].get_legend_handles_labels()[1]
    assert labels == ["final (n = 3)", "old (n = 1 to 2, 1 diverged)"]


def test_arms_that_share_a_name_are_told_apart():
    name_of = lambda *found: [arm.name for arm in plot_data.arms_of(found)]
    four, three = make_record(epochs=4), make_record(epochs=3)
    assert name_of(four, make_record("a$b"), three) == ["final, 3 epochs", "final, 4 epochs", "a$b"]
    wider = make_record(epochs=3, recipe_hash="beefbeefbeef")
    assert name_of(three, wider) == ["final@00000000", "final@beefbeef"]
    assert name_of(three, make_record(seed=1)) == ["final"]
    odd = make_record(recipe={"num_epochs": ["?"]}, recipe_hash="0dd")
    assert name_of(odd, four) == ["final, 3 epochs", "final, 4 epochs"]
    assert b"a$b (n = 1)" in plots.render(plots.curves, plot_data.arms_of([make_record("a$b")]), form="svg")


def test_lengths_of_keeps_other_recipes_apart():
    other = make_record("final_e9", 0, 9, recipe={"num_epochs": 9, "optim.peak_lr": 0.1})
    found = plot_data.lengths_of(plot_data.arms_of([make_record("final_e3"), other]))
    assert list(found) == ["final", "final@00000000"]
    twins = [make_record("a", epochs=3, recipe_hash="1"), make_record("b", epochs=3, recipe_hash="2")]
    with pytest.raises(ValueError, match="a and b are both of 3 epochs"):
        plot_data.lengths_of(plot_data.arms_of(twins))


def test_curves_show_every_run_and_the_mean():
    found = [make_record("final", seed, 4, 0.5 + 0.01 * seed) for seed in range(3)]
    found += [make_record("old", 0, 2, 0.4), make_record("old", 1, 2, status="crashed")]
    arms = plot_data.arms_of(found)
    figure = plots.curves(arms)
    columns = ("train_accuracy", "test_accuracy", "train_loss", "test_loss")
    for axis, column in zip(figure.axes, columns, strict=True):
        scale = 100 if "accuracy" in column else 1
        lines = lines_of(axis)
        for arm, label in zip(arms, ("final (n = 3)", "old (n = 1, 1 crashed)"), strict=True):
            rows = [[scale * getattr(row, column) for row in record.epochs] for record in arm.records if record.result]
            epochs = range(1, len(rows[0]) + 1)
            np.testing.assert_allclose(lines[label], (epochs, np.mean(rows, axis=0)))
            for row in rows:
                assert any(line.shape[1] == len(row) and np.allclose(line[1], row) for line in lines.values())
    assert [axis.get_ylabel() for axis in figure.axes][:2] == ["training accuracy (%)", "test accuracy (%)"]


def test_runs_are_read_from_folders_and_files(tmp_path):
    kept = [records.write(make_record("final", seed), tmp_path / "runs") for seed in range(2)]
    for paths in ([tmp_path / "runs"], [tmp_path / "runs" / "final"], [kept[0], kept[1], tmp_path / "runs"]):
        assert [record.seed for record in plot_data.read_runs(paths)] == [0, 1]
    with pytest.raises(ValueError, match="no records in .*nowhere"):
        plot_data.read_runs([tmp_path / "nowhere"])
    records.write(make_record("final", 0), tmp_path / "copy")
    with pytest.raises(ValueError, match="are records of one run"):
        plot_data.read_runs([tmp_path / "runs", tmp_path / "copy"])
    other = {"source": "others", "hash": "bb", "train": 100, "test": 10}
    records.write(make_record("final", 5, data=other), tmp_path / "copy")
    with pytest.raises(ValueError, match="saw different images: .*digits.*others"):
        plot_data.read_runs([tmp_path / "copy"])


def check_picture(path):
    if path.suffix == ".png":
        with Image.open(path) as image:
            image.verify()
            assert min(image.size) > 100
    else:
        assert ElementTree.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"


@pytest.mark.parametrize(
    "command",
    [
        "augmentations baseline --set augmentations.0.padding=2 --limit-train 5",
        "whitening --patch 2",
        "celu",
        "schedule baseline final airbench94 --epochs 8",
        "bn-dynamics normed.py --epochs 1 --width 3 --set batch_size=32",
        "convergence",
        "curves runs/final",
    ],
)
def test_every_kind_leaves_a_picture(workplace, loaded, call, command):
    Path("normed.py").write_text(NORMED)
    for seed in range(2):
        records.write(make_record("final", seed), Path("runs"))
    forms = ("svg",) if command.startswith("bn") else ("png", "svg")  # one training is enough
    for form in forms:
        status, out, _ = call("plot", *command.split(), "--out", f"pictures/it.{form}")
        assert status == 0 and f"wrote pictures/it.{form}" in out
        check_picture(Path(f"pictures/it.{form}"))
    assert len(list(Path("pictures").iterdir())) == len(forms)


@pytest.mark.parametrize("form", ["png", "svg"])
def test_pictures_are_the_same_each_time(form):
    rates = {"final": plot_data.learning_rates(final, 97)}
    first, second = (plots.render(plots.schedules, rates, form=form) for _ in range(2))
    assert first == second
    if form == "svg":
        assert b"<dc:date>" not in first
    else:
        with Image.open(io.BytesIO(first)) as image:
            assert image.convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255)


@pytest.mark.parametrize(
    ("command", "status", "message"),
    [
        ("augmentations nothing --out a.png", 2, "there is no experiment 'nothing'"),
        ("whitening whitening_* --out a.png", 2, "whitening_* stands for 2 recipes; name one"),
        ("schedule missing.py --out a.png", 2, "there is no file missing.py"),
        ("schedule final --epochs 0 --out a.png", 2, "num_epochs is 0"),
        ("bn-dynamics trick.py --out a.png", 2, "no batch norm with a trained scale or bias"),
        ("convergence nowhere --out a.png", 2, "no records in nowhere"),
        ("curves --out a.png", 2, "no records in runs"),
        ("curves trick.py --out a.png", 2, "trick.py is not a record of a run"),
        ("celu --out a.pdf", 2, "a.pdf must end with .png or .svg"),
        ("celu --out trick.py/a.png", 1, "cannot write trick.py/a.png"),
        ("celu", 2, "Missing option '--out'"),
        ("pie --out a.png", 2, "No such command 'pie'"),
        ("network nothing --out a.png", 2, "there is no experiment 'nothing'"),
    ],
)
def test_mistakes_are_one_line_and_leave_no_file(workplace, loaded, call, command, status, message):
    before = set(Path().iterdir())
    found, _, err = call("plot", *command.split())
    assert found == status and message in err and err.startswith("error: ") and err.count("\n") == 1
    assert set(Path().iterdir()) == before


def test_no_finished_run(workplace, call):
    records.write(make_record(status="diverged"), Path("runs"))
    status, _, err = call("plot", "curves", "--out", "a.png")
    assert status == 2 and "no run in runs has finished" in err and not Path("a.png").exists()


def test_a_diverged_run_is_told_of(workplace, loaded, call, monkeypatch):
    def make_train(recipe, num_classes):
        def train(key, dataset, on_epoch, on_snapshot):
            raise Diverged(recipe.name, make_record(epochs=2).epochs)

        return train

    monkeypatch.setattr(plot_data, "make_train", make_train)
    Path("normed.py").write_text(NORMED)
    status, _, err = call("plot", "bn-dynamics", "normed.py", "--out", "a.png")
    assert status == 2 and "normed diverged in epoch 2" in err and not Path("a.png").exists()


def test_without_matplotlib(workplace, call, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, _, err = call("plot", "celu", "--out", "a.png")
    assert status == 2 and "plots need matplotlib" in err and "pip install -e '.[plot]'" in err
    assert not Path("a.png").exists()
