"""The augmentations and batches of the fast PyTorch twin: by the package's laws, and pixel for pixel."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bag_of_tricks import baseline, gpu_preprocessing
from fastcifar_jax.augment import Crop, Cutout, Flip, GroupedSampling, IndependentSampling, augment, normalize
from fastcifar_jax.types import Dataset, StepInfo
from tests.test_train import small

torch = pytest.importorskip("torch", reason='needs PyTorch: pip install -e ".[compare]"')

from fastcifar_jax.torch_baseline import train as torch_twin
from fastcifar_jax.torch_baseline.train import Plan, draw_plan, make_batch, make_train
from tests.helpers_torch import generator

ALL = (Crop(4), Flip(), Cutout(8))

pytestmark = pytest.mark.usefixtures("torch_on_one_thread")


def counts(options):
    return options.unique(dim=0, return_counts=True)[1]


def test_groups_are_balanced():
    plan = draw_plan(gpu_preprocessing, 50_000, 32, 32, generator())
    crop, flip, cutout = (counts(options) for options in plan.options)
    assert sorted(crop.tolist()) == [617] * 58 + [618] * 23
    assert flip.tolist() == [25_000] * 2
    assert cutout.tolist() == [250] * 200
    assert torch.equal(plan.order.sort()[0], torch.arange(50_000))


def test_each_epoch_keeps_other_options():
    draws = generator()
    plans = [draw_plan(gpu_preprocessing, 400, 32, 32, draws) for _ in range(20)]
    assert len(torch.cat([plan.options[2] for plan in plans]).unique(dim=0)) > 600  # of 625; a plan uses 200


@pytest.mark.parametrize(("num_images", "max_options"), [(731, 200), (731, None), (60, 200)])
def test_groups_differ_by_one_image_at_most(num_images, max_options):
    recipe = replace(gpu_preprocessing, sampling=GroupedSampling(max_options))
    plan = draw_plan(recipe, num_images, 32, 32, generator())
    for augmentation, options in zip(ALL, plan.options, strict=True):
        used = min(len(augmentation.options(32, 32)), max_options or 1000, num_images)
        assert len(counts(options)) == used
        assert counts(options).max() - counts(options).min() <= 1


def test_transforms_are_grouped_independently():
    """Which images are flipped says nothing about where they are cropped or cut, nor about their place in the epoch."""
    plan = draw_plan(gpu_preprocessing, 50_000, 32, 32, generator())
    crop, flip, cutout = (options.float() for options in plan.options)
    place = plan.order.argsort().float()
    found = torch.corrcoef(torch.stack([place, flip, *crop.T, cutout[:, 0]]))
    assert (found - torch.eye(5)).abs().max() < 0.02  # the standard deviation of each is 0.004


def test_per_example_options_are_uniform():
    plan = draw_plan(replace(baseline, sampling=IndependentSampling()), 100_000, 32, 32, generator())
    for options, count in zip(plan.options, (81, 2, 625), strict=True):
        found = counts(options).double()
        assert len(found) == count
        # Chi-square over `count` options has mean count - 1 and variance 2 (count - 1).
        chi_square = ((found - 100_000 / count) ** 2 / (100_000 / count)).sum()
        assert 0 < chi_square < (count - 1) + 5 * np.sqrt(2 * (count - 1))


@pytest.mark.parametrize(
    "augmentations",
    [ALL, (Crop(4), Flip()), (Cutout(5), Flip(), Crop(7)), (Crop(2), Cutout(3), Crop(1), Cutout(4)), ()],
    ids=str,
)
def test_pixels_are_those_of_the_package(augmentations):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 12, 16, 3)).astype(np.uint8)
    tables = [augmentation.options(12, 16) for augmentation in augmentations]
    choices = [rng.integers(0, len(table), 40) for table in tables]
    options = tuple(torch.as_tensor(table[choice]) for table, choice in zip(tables, choices, strict=True))
    ids = rng.permutation(40)[:30]

    recipe = replace(baseline, augmentations=augmentations)
    found = make_batch(recipe, torch.as_tensor(images), Plan(torch.arange(40), options), torch.as_tensor(ids))
    normalized = normalize(jnp.asarray(images[ids]), recipe.mean, recipe.std)
    expected = augment(normalized, augmentations, tuple(jnp.asarray(choice[ids]) for choice in choices))
    assert found.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(found.permute(0, 2, 3, 1), expected, rtol=1e-6, atol=1e-7)


def test_an_epochs_batches_hold_every_image_once_with_its_label(monkeypatch):
    seen = []

    def make_spy(recipe, network, average, steps_per_epoch, **kwargs):
        def step(images, labels):
            seen.append((images, labels))
            return StepInfo(torch.tensor(1.0), torch.tensor(3))

        return step

    monkeypatch.setattr(torch_twin, "make_step", make_spy)
    grey = np.arange(100, dtype=np.uint8)
    images = np.broadcast_to(grey[:, None, None, None], (100, 16, 16, 3))
    recipe = small(baseline, num_epochs=2, mean=(0.0,) * 3, std=(1.0,) * 3)
    grey_images = Dataset(images, grey.astype(np.int32), images[:8], np.zeros(8, np.int32))
    train = make_train(recipe, 100)
    result, other = train(0, grey_images), train(1, grey_images)
    epochs = seen[1:4], seen[4:7], seen[7:10], seen[10:]  # the first is the warm-up
    orders = [torch.cat([labels for _, labels in epoch]) for epoch in epochs]
    for epoch, order in zip(epochs, orders, strict=True):
        assert len(order) == len(order.unique()) == 96
        for x, labels in epoch:
            assert torch.equal(x, labels[:, None, None, None].float().expand_as(x))
    assert len({tuple(order.tolist()) for order in orders}) == 4  # another order each epoch and for each seed
    assert not torch.equal(result.state["linear.weight"], other.state["linear.weight"])  # the spy trains nothing
    assert [(row.train_loss, row.train_accuracy) for row in result.epochs] == [(3 / 96, 9 / 96)] * 2
