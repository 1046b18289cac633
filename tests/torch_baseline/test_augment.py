"""Plans and batches in PyTorch: by the package's laws, and pixel for pixel."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bag_of_tricks import baseline, gpu_preprocessing
from fastcifar_jax.augment import AlternatingFlip, Crop, Cutout, Flip, GroupedSampling, augment, normalize

torch = pytest.importorskip("torch", reason='needs PyTorch: pip install -e ".[compare]"')

from fastcifar_jax.torch_baseline.augment import EpochPlan, make_batch, plan_epoch

ALL = (Crop(4), Flip(), Cutout(8))

pytestmark = pytest.mark.usefixtures("torch_on_one_thread")


def plan_of(recipe, num_images, epoch=1, seed=0):
    return plan_epoch(recipe, seed, epoch, num_images, 32, 32)


def counts(options):
    return options.unique(dim=0, return_counts=True)[1]


def test_groups_are_balanced_and_independent():
    plan = plan_of(gpu_preprocessing, 50_000)
    crop, flip, cutout = (counts(options) for options in plan.options)
    assert sorted(crop.tolist()) == [617] * 58 + [618] * 23
    assert flip.tolist() == [25_000] * 2
    assert cutout.tolist() == [250] * 200
    assert torch.equal(plan.order.sort()[0], torch.arange(50_000))
    # Which images are flipped tells nothing about where they are cropped or cut, nor about their place in the epoch.
    crop, flip, cutout = (options.float() for options in plan.options)
    found = torch.corrcoef(torch.stack([plan.order.argsort().float(), flip, *crop.T, cutout[:, 0]]))
    assert (found - torch.eye(5)).abs().max() < 0.02  # the standard deviation of each is 0.004


def test_epochs_and_seeds_have_plans_of_their_own():
    plans = [plan_of(gpu_preprocessing, 400, epoch) for epoch in range(1, 21)]
    assert len(torch.cat([plan.options[2] for plan in plans]).unique(dim=0)) > 600  # of 625; a plan uses 200
    orders = {tuple(plan.order.tolist()) for plan in (*plans, plan_of(gpu_preprocessing, 400, seed=1))}
    assert len(orders) == 21
    assert all(torch.equal(a, b) for a, b in zip(plans[2].options, plan_of(gpu_preprocessing, 400, 3).options))


@pytest.mark.parametrize(("num_images", "max_options"), [(731, 200), (731, None), (60, 200)])
def test_groups_differ_by_one_image_at_most(num_images, max_options):
    plan = plan_of(replace(gpu_preprocessing, sampling=GroupedSampling(max_options)), num_images)
    for augmentation, options in zip(ALL, plan.options, strict=True):
        used = min(len(augmentation.options(32, 32)), max_options or 1000, num_images)
        assert len(counts(options)) == used
        assert counts(options).max() - counts(options).min() <= 1


def test_independent_options_are_uniform():
    for options, count in zip(plan_of(baseline, 100_000).options, (81, 2, 625), strict=True):
        found = counts(options).double()
        assert len(found) == count
        # Chi-square over `count` options has mean count - 1 and variance 2 (count - 1).
        chi_square = ((found - 100_000 / count) ** 2 / (100_000 / count)).sum()
        assert 0 < chi_square < (count - 1) + 5 * np.sqrt(2 * (count - 1))


def test_alternating_flips_show_every_image_both_ways():
    recipe = replace(baseline, augmentations=(Crop(2), AlternatingFlip(), AlternatingFlip()))
    flips = [[x.numpy() for x in plan_of(recipe, 1000, epoch).options[1:]] for epoch in (1, 2, 3)]
    for first, second, third in zip(*flips, strict=True):
        assert 400 < first.sum() < 600 and np.all(first != second) and np.all(first == third)
    assert 400 < np.sum(flips[0][0] == flips[0][1]) < 600
    assert np.any(flips[0][0] != plan_of(recipe, 1000, seed=1).options[1].numpy())


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

    recipe, plan = replace(baseline, augmentations=augmentations), EpochPlan(torch.arange(40), options)
    found = make_batch(recipe, torch.as_tensor(images), plan, torch.as_tensor(ids), torch.float32)
    normalized = normalize(jnp.asarray(images[ids]), recipe.mean, recipe.std)
    expected = augment(normalized, augmentations, tuple(jnp.asarray(choice[ids]) for choice in choices))
    assert found.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(found.permute(0, 2, 3, 1), expected, rtol=1e-6, atol=1e-7)
