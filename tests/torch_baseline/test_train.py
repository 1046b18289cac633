"""Runs in PyTorch; `tests/reference` compares its steps with the package's."""

from dataclasses import replace

import numpy as np
import pytest

from experiments.airbench import airbench94, airbench94_muon
from experiments.bag_of_tricks import baseline, final
from fastcifar_jax.augment import AlternatingFlip, Crop
from fastcifar_jax.averaging import Ema
from fastcifar_jax.evaluate import NoTTA
from fastcifar_jax.train import Diverged
from fastcifar_jax.types import Dataset, EpochInfo, StepInfo
from tests.helpers_train import DATASET, make_dataset, numbers, small

torch = pytest.importorskip("torch", reason='needs PyTorch: pip install -e ".[compare]"')

from fastcifar_jax.torch_baseline import bench
from fastcifar_jax.torch_baseline import train as torch_train
from fastcifar_jax.torch_baseline.augment import normalize
from fastcifar_jax.torch_baseline.evaluate import predict_views, summed_loss
from fastcifar_jax.torch_baseline.models import make_network, whitening_filters
from fastcifar_jax.torch_baseline.train import train_epochs, warm_up
from fastcifar_jax.torch_baseline.train_step import Trainer

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def one_thread(torch_on_one_thread):
    """In runs too."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (torch_train, bench):
            patch.setattr(module, "available_cores", lambda: 1)
        yield


def last_of(recipe, seed=0, dataset=DATASET):
    """The last snapshot of a run."""
    *_, last = train_epochs(recipe, 4, seed, dataset)
    return last


@pytest.fixture(scope="module")
def final_run():
    """`final` at the tests' size and the last snapshot of its run with seed 0."""
    recipe = small(final)
    return recipe, last_of(recipe)


def test_initial_weights_are_pytorchs_and_leave_its_generators_alone():
    before = torch.get_rng_state()
    network = make_network(final.model, 10, 3, CPU)
    assert torch.equal(torch.get_rng_state(), before)
    for name, weight in network.named_parameters():
        weight = weight.detach()
        if weight.ndim > 1:
            bound = weight[0].numel() ** -0.5
            assert 0.97 * bound < weight.abs().max() <= bound, name
            assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1), name
        else:
            assert (weight == (1 if name.endswith("weight") else 0)).all(), name
    trained = [p for p in network.parameters() if p.requires_grad]
    assert len(trained) == 17 and sum(p.numel() for p in trained) == 6_570_880
    again, other = make_network(final.model, 10, 3, CPU), make_network(final.model, 10, 4, CPU)
    assert torch.equal(again.linear.weight, network.linear.weight)
    assert not torch.equal(other.linear.weight, network.linear.weight)


def test_an_airnet_starts_as_the_package_says():
    network = make_network(airbench94_muon.model, 10, 0, CPU)
    second = network.group2_1.conv.weight.detach()  # 64 -> 256
    np.testing.assert_array_equal(second[:64, :, 1, 1], np.eye(64))
    assert second[:64].abs().sum() == 64 and 0 < second[64:].abs().max() <= (9 * 64) ** -0.5
    assert float(network.linear.weight.detach().std()) == pytest.approx(1)
    assert 0.1 < network.whiten.bias.detach().abs().max() <= 12**-0.5
    assert not make_network(airbench94.model, 10, 0, CPU).whiten.bias.any()


@pytest.mark.parametrize(("recipe", "size"), [(final, 3), (airbench94, 2)], ids=lambda x: getattr(x, "name", x))
def test_filters_come_from_the_first_images_and_stay(recipe, size):
    recipe = small(recipe, init_images=40)
    found = last_of(recipe).state["whiten.weight"]
    images = normalize(recipe, torch.tensor(DATASET.train_images[:40]), torch.float32)
    expected = whitening_filters(images, recipe.model.whiten_eps, size)
    expected = torch.cat([expected, -expected]) if size == 2 else expected
    np.testing.assert_allclose(found.abs(), expected.abs(), rtol=1e-2, atol=1e-3)


def test_the_whitening_bias_of_an_airnet_is_frozen():
    trainer = Trainer(small(airbench94, optim=replace(airbench94.optim, whiten_bias_epochs=1)), 4, 2)
    images, labels = torch.randn(32, 3, 16, 16), torch.arange(32) % 4
    trainer.network.train()
    biases = [trainer.step(images, labels) and trainer.network.whiten.bias.detach().clone() for _ in range(4)]
    assert [torch.equal(a, b) for a, b in zip(biases, biases[1:], strict=False)] == [False, True, True]
    assert trainer.network.whiten.bias.grad is None


def test_same_seed_same_numbers_bit_for_bit(final_run):
    recipe, first = final_run
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    assert warm_up(recipe, 4, DATASET) > 0
    again, other = last_of(recipe), last_of(recipe, seed=1)
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == threads
    assert numbers(again) == numbers(first)
    assert all(torch.equal(again.state[name], first.state[name]) for name in first.state)
    assert numbers(other) != numbers(first)


def test_snapshots_have_the_packages_form(final_run):
    recipe, result = final_run
    assert [row.epoch for row in result.epochs] == [1, 2, 3]
    assert [row.tta_loss is None for row in result.epochs] == [True, True, False]
    *_, every = train_epochs(recipe, 4, 0, DATASET, tta_every_epoch=True)
    assert [row[:-2] for row in numbers(every)] == [row[:-2] for row in numbers(result)]
    for row in every.epochs:
        assert isinstance(row, EpochInfo)
        assert all(type(value) is float for value in row[1:])
        for accuracy, images in ((row.train_accuracy, 96), (row.test_accuracy, 20), (row.tta_accuracy, 20)):
            assert 0 <= accuracy <= 1 and accuracy * images == pytest.approx(round(accuracy * images))
    assert result.setup_seconds > 0


def test_a_run_is_an_iterator_that_reports_steps(final_run, monkeypatch):
    recipe, first = final_run
    monkeypatch.setattr(torch_train, "REPORT_SECONDS", 0.0)
    threads, steps = torch.get_num_threads(), []
    snapshots = list(train_epochs(recipe, 4, 0, DATASET, on_steps=lambda *seen: steps.append(seen)))
    assert [len(snapshot.epochs) for snapshot in snapshots] == [1, 2, 3]
    assert numbers(snapshots[-1]) == numbers(first)
    assert steps == [(epoch, step) for epoch in (1, 2, 3) for step in (1, 2, 3)]
    run = train_epochs(recipe, 4, 0, DATASET)
    next(run)
    run.close()  # a caller that stops early
    assert torch.get_num_threads() == threads


def test_the_last_epoch_may_be_a_part_of_one():
    result = last_of(small(baseline, num_epochs=1.5))  # 5 of 6 steps
    assert len(result.epochs) == 2 and result.epochs[1].train_accuracy * 64 % 1 == 0


def test_an_epochs_batches_hold_every_image_once_with_its_label(monkeypatch):
    seen = []

    def step(self, images, labels):
        seen.append((images, labels))
        return StepInfo(torch.tensor(1.0), torch.tensor(3))

    monkeypatch.setattr(Trainer, "step", step)
    grey = np.arange(100, dtype=np.uint8)
    images = np.broadcast_to(grey[:, None, None, None], (100, 16, 16, 3))
    recipe = small(baseline, num_epochs=2, mean=(0.0,) * 3, std=(1.0,) * 3)
    runs = [list(train_epochs(recipe, 100, seed, Dataset(images, grey, images[:8], grey[:8]))) for seed in (0, 1)]
    epochs = [seen[i : i + 3] for i in range(0, 12, 3)]
    orders = [torch.cat([labels for _, labels in epoch]) for epoch in epochs]
    for epoch, order in zip(epochs, orders, strict=True):
        assert len(order) == len(order.unique()) == 96
        for x, labels in epoch:
            assert torch.equal(x, labels[:, None, None, None].float().expand_as(x))
    assert len({tuple(order.tolist()) for order in orders}) == 4  # another order in each epoch and for each seed
    weights = [run[-1].state["linear.weight"] for run in runs]
    assert not torch.equal(*weights)  # nothing was trained
    assert [(row.train_loss, row.train_accuracy) for row in runs[0][-1].epochs] == [(3 / 96, 9 / 96)] * 2


def test_the_average_is_evaluated_and_changes_no_training(final_run):
    recipe, averaged = final_run
    live = last_of(replace(recipe, average=None))
    last = last_of(replace(recipe, average=Ema(decay=0.0, every=1)))
    trained = lambda result: [row[:4] for row in numbers(result)]
    assert trained(averaged) == trained(live) == trained(last)
    assert numbers(last) == numbers(live) != numbers(averaged)
    for name, x in live.state.items():
        assert torch.equal(last.state[name], x)
        if name.endswith(("conv.weight", "mean", "var", "bias")):
            assert not torch.equal(averaged.state[name], x), name


def test_evaluation_is_that_of_the_final_state():
    recipe = small(baseline, num_epochs=8, augmentations=())  # a mirrored quadrant is another class
    result = last_of(recipe)
    network = make_network(recipe.model, 4, 0, CPU)
    network.load_state_dict(result.state)
    x, labels = normalize(recipe, torch.tensor(DATASET.test_images), torch.float32), torch.tensor(DATASET.test_labels)
    with torch.no_grad():
        views = predict_views(recipe, network.eval(), x)
        plain, mirrored = network(x), network(x.flip(3))
    row = result.epochs[-1]
    assert row.test_accuracy > 0.7 > row.tta_accuracy
    torch.testing.assert_close(views, (plain, (plain + mirrored) / 2))
    for logits, loss, accuracy in zip(
        views, (row.test_loss, row.tta_loss), (row.test_accuracy, row.tta_accuracy), strict=True
    ):
        assert loss == pytest.approx(summed_loss(recipe, logits, labels.long()).item() / 20, rel=1e-3, abs=1e-6)
        assert accuracy == pytest.approx((logits.argmax(1) == labels).sum().item() / 20)


def test_evaluation_in_chunks_is_the_same(final_run, monkeypatch):
    recipe, first = final_run
    monkeypatch.setattr("fastcifar_jax.torch_baseline.evaluate.CHUNK", 7)  # of 20 images
    row = last_of(recipe).epochs[-1]
    assert row[5::2] == first.epochs[-1][5::2]
    np.testing.assert_allclose(row[4::2], first.epochs[-1][4::2], rtol=1e-5)


def test_without_tta_both_columns_are_the_same():
    row = last_of(small(final, tta=NoTTA())).epochs[-1]
    assert (row.test_loss, row.test_accuracy) == (row.tta_loss, row.tta_accuracy)


@pytest.mark.parametrize("recipe", [airbench94, airbench94_muon], ids=lambda recipe: recipe.name)
def test_the_loss_of_an_airnet_falls(recipe):
    """Its maximum over the whole map does not see which quadrant is bright, so the test accuracy says little."""
    recipe = small(recipe, num_epochs=15.5, augmentations=(Crop(2), AlternatingFlip()))
    result = last_of(recipe)
    assert len(result.epochs) == 16 and result.epochs[-1].train_loss < result.epochs[0].train_loss - 0.03


@pytest.mark.parametrize("compute_dtype", ["float32", "mixed"])
def test_it_learns(compute_dtype):
    """100 steps of the baseline tell the quadrants apart, as in the package; chance is 0.25."""
    recipe = small(baseline, num_epochs=20, augmentations=(), compute_dtype=compute_dtype)
    result = last_of(recipe, dataset=make_dataset(160, 40))
    assert result.epochs[-1].test_accuracy > 0.9
    assert result.epochs[-1].train_loss < result.epochs[0].train_loss


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-4), ("mixed", 0.02), ("float16", 0.003)])
def test_other_dtypes_are_the_same_run_but_for_rounding(final_run, dtype, tolerance):
    _, float32 = final_run
    found = last_of(small(final, compute_dtype=dtype))
    assert numbers(found) != numbers(float32)
    assert found.epochs[0].train_loss == pytest.approx(float32.epochs[0].train_loss, rel=tolerance)
    expected = torch.float64 if dtype == "float64" else torch.float32
    assert all(x.dtype == expected for x in found.state.values())
    if dtype == "mixed":
        assert numbers(found) == numbers(last_of(small(final, compute_dtype="bfloat16")))


def test_diverged():
    recipe, seen = small(final), []
    run = train_epochs(replace(recipe, optim=replace(recipe.optim, peak_lr=1e30)), 4, 0, DATASET)
    with pytest.raises(Diverged, match="final diverged in epoch 1.*lower optim.peak_lr") as error:
        seen.extend(run)
    assert not seen and not np.isfinite(error.value.epochs[-1].train_loss)


def test_bench_steps_train(monkeypatch):
    seen, step = [], Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self, *batch: seen.append(step(self, *batch)))
    take, on_gpu = bench.prepare(small(final, compute_dtype="bfloat16"), 4, DATASET, compiled=False, tuned=False)
    for _ in range(3):
        take(4)  # of 3 steps in an epoch
    assert not on_gpu and len(seen) == 12 and np.isfinite(float(seen[0].loss)) and seen[-1].loss < seen[0].loss
    assert torch_train.versions() == {"torch": torch.__version__}
