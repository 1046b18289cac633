import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastcifar_jax.augment import (
    AlternatingFlip,
    Crop,
    Cutout,
    Flip,
    GroupedSampling,
    IndependentSampling,
    augment,
    normalize,
    permutations,
    plan_epoch,
)
from tests.helpers_train import numpy_apply

ALL = (Crop(4), Flip(), Cutout(8))


def images_of(num_images, size=32):
    return np.random.default_rng(0).normal(size=(num_images, size, size, 3)).astype(np.float32)


@pytest.mark.parametrize(
    ("augmentation", "count"),
    [(Crop(4), 81), (Flip(), 2), (Cutout(8), 625), (Cutout(5), 784), (Cutout(12), 441)],
    ids=str,
)
def test_number_of_options(augmentation, count):
    options = augmentation.options(32, 32)
    assert len(options) == count == len(np.unique(options, axis=0))


def test_options_have_x_in_the_outer_loop():
    assert Crop(1).options(8, 8).tolist()[:4] == [[0, 0], [0, 1], [0, 2], [1, 0]]
    assert Cutout(7).options(8, 8).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


@pytest.mark.parametrize("augmentation", [Crop(4), Crop(2), Flip(), Cutout(8), Cutout(5)], ids=str)
def test_every_option_equals_its_numpy_twin(augmentation):
    options = augmentation.options(16, 16)
    images = images_of(len(options), 16)
    found = jax.jit(lambda images: augment(images, (augmentation,), (jnp.arange(len(options)),)))(images)
    expected = [numpy_apply(augmentation, image, option) for image, option in zip(images, options, strict=True)]
    chex.assert_trees_all_equal(np.asarray(found), np.stack(expected))


def test_reflect_does_not_repeat_the_edge():
    row = jnp.tile(jnp.arange(6.0)[None, :, None], (6, 1, 1))
    assert Crop(4)(row, jnp.array([0, 4]))[0, :, 0].tolist() == [4, 3, 2, 1, 0, 1]
    assert Crop(4)(row, jnp.array([8, 4]))[0, :, 0].tolist() == [4, 5, 4, 3, 2, 1]


def numpy_rebuild(key, augmentations, images, labels, max_options):
    """The original's way: the whole data set is rebuilt, transform by transform (section 2.3), with the same draws.

    A shuffle of the set as the last transform left it takes it to the next independent permutation.
    """
    count, (height, width) = len(augmentations), images.shape[1:3]
    options = [augmentation.options(height, width) for augmentation in augmentations]
    drawn = permutations(key, [len(images)] * (count + 1) + [len(rows) for rows in options])
    order, *shuffled, kept = *map(np.asarray, drawn[: count + 1]), drawn[count + 1 :]
    for augmentation, new, rows, few in zip(augmentations, shuffled, options, kept, strict=True):
        permutation = np.argsort(labels)[new]
        images, labels = images[permutation], labels[permutation]
        few = np.asarray(few)[:max_options]
        chunks = np.array_split(np.arange(len(images)), len(few))
        images = np.stack(
            [
                numpy_apply(augmentation, images[i], option)
                for option, chunk in zip(rows[few], chunks, strict=True)
                for i in chunk
            ]
        )
    permutation = np.argsort(labels)[order]
    return images[permutation], labels[permutation]


def test_permutations_are_uniform_and_independent():
    """All pairs of the orders of three and two things: chi-square over 12 cells has mean 11 and deviation 4.7."""
    keys = jax.random.split(jax.random.key(0), 12_000)
    three, two, five = jax.vmap(lambda key: tuple(permutations(key, [3, 2, 5])))(keys)
    np.testing.assert_array_equal(np.sort(five, axis=1), np.tile(np.arange(5), (len(keys), 1)))
    cells = np.unique(np.hstack([three, two]), axis=0, return_counts=True)[1]
    assert len(cells) == 12 and ((cells - 1000) ** 2 / 1000).sum() < 11 + 5 * 4.7
    program = jax.jit(lambda key: permutations(key, [3, 2, 5])).lower(keys[0]).as_text()
    assert program.count("stablehlo.sort") == 1


@pytest.mark.parametrize("num_images", [60, *(pytest.param(n, marks=pytest.mark.slow) for n in (731, 1000))])
def test_composed_groups_equal_rebuilding_the_data_set(key, num_images):
    images, labels = images_of(num_images), np.arange(num_images)
    plan = jax.jit(lambda key: GroupedSampling(200)(key, ALL, num_images, 32, 32))(key)
    found = augment(jnp.asarray(images)[plan.order], ALL, tuple(choice[plan.order] for choice in plan.choices))
    expected_images, expected_labels = numpy_rebuild(key, ALL, images, labels, 200)
    np.testing.assert_array_equal(labels[np.asarray(plan.order)], expected_labels)
    chex.assert_trees_all_equal(np.asarray(found), expected_images)


def test_groups_are_balanced(key):
    plan = GroupedSampling(200)(key, ALL, 50_000, 32, 32)
    crop, flip, cutout = (np.unique_counts(choice) for choice in plan.choices)
    assert sorted(np.unique_counts(crop.counts).counts.tolist()) == [23, 58]
    assert np.unique(crop.counts).tolist() == [617, 618]
    assert flip.counts.tolist() == [25_000, 25_000]
    assert cutout.counts.tolist() == [250] * 200
    np.testing.assert_array_equal(np.sort(plan.order), np.arange(50_000))


@pytest.mark.parametrize("num_images", [50, 161, *(pytest.param(n, marks=pytest.mark.slow) for n in (81, 100))])
def test_groups_of_one_or_two_images_are_balanced(key, num_images):
    [choice] = GroupedSampling(None)(key, (Crop(4),), num_images, 32, 32).choices
    counts = np.bincount(choice, minlength=81)
    assert len(counts) == 81 and counts.sum() == num_images
    assert counts.max() - counts.min() <= 1


def test_transforms_are_grouped_independently(key):
    """Which images are flipped says nothing about where they are cropped, nor about their place in the epoch."""
    plan = GroupedSampling(200)(key, ALL, 50_000, 32, 32)
    crop, flip, _ = (np.asarray(choice) for choice in plan.choices)
    place = np.argsort(plan.order)
    assert abs(np.corrcoef(crop, flip)[0, 1]) < 0.02
    assert abs(np.corrcoef(place, flip)[0, 1]) < 0.02


@pytest.mark.parametrize("choices", [IndependentSampling(), GroupedSampling(200), GroupedSampling(None)], ids=str)
def test_plan_depends_on_the_key_alone(choices):
    plan = lambda seed: choices(jax.random.key(seed), ALL, 500, 32, 32)
    chex.assert_trees_all_equal(plan(0), plan(0))
    assert not np.array_equal(plan(0).order, plan(1).order)
    assert not np.array_equal(plan(0).choices[0], plan(1).choices[0])
    np.testing.assert_array_equal(np.sort(plan(1).order), np.arange(500))


def test_per_example_choices_are_uniform(key):
    plan = IndependentSampling()(key, ALL, 100_000, 32, 32)
    for choice, count in zip(plan.choices, (81, 2, 625), strict=True):
        found = np.bincount(choice, minlength=count)
        assert len(found) == count
        # Chi-square over `count` options has mean count - 1 and variance 2 (count - 1).
        chi_square = ((found - 100_000 / count) ** 2 / (100_000 / count)).sum()
        assert abs(chi_square - (count - 1)) < 5 * np.sqrt(2 * (count - 1))


def test_normalize_golden_float16_constants():
    mean, std = (125.31, 122.95, 113.87), (62.99, 62.09, 66.70)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3)).astype(np.uint8)
    found = normalize(jnp.asarray(pixels), mean, std, jnp.float16)
    rounded = (np.float16([125.3125, 122.9375, 113.875]), np.float16([63.0, 62.09375, 66.6875]))
    chex.assert_trees_all_close(np.asarray(found), (pixels.astype(np.float16) - rounded[0]) / rounded[1], atol=2e-3)
    exact = (pixels - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(normalize(jnp.asarray(pixels), mean, std), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Crop(-1), "padding -1"),
        (lambda: Cutout(0), "size 0"),
        (lambda: GroupedSampling(0), "max_options 0"),
        (lambda: Crop(8).options(8, 8), "pads by 8"),
        (lambda: Cutout(9).options(8, 8), "does not fit"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("augmentation", [Crop(2), Flip(), Cutout(3)])
def test_options_stay_int32_in_64_bit_mode(augmentation):
    with jax.enable_x64(True):
        option = jnp.asarray(augmentation.options(8, 8)[-1])
        image = jnp.arange(8 * 8 * 3, dtype=jnp.float64).reshape(8, 8, 3)
        found = jax.jit(augmentation)(image, option)
        assert found.dtype == image.dtype and found.shape == image.shape


def test_alternating_flip_shows_every_image_both_ways(key):
    """Within each pair of epochs; the half that begins is the same in all of them, whatever the epoch draws."""
    plan = lambda epoch: plan_epoch(
        key, jnp.int32(epoch), IndependentSampling(), (Crop(2), AlternatingFlip()), 1000, 8, 8
    )
    plans = [plan(epoch) for epoch in (1, 2, 3, 4)]
    flips = [np.asarray(plan.choices[1]) for plan in plans]
    assert set(flips[0].tolist()) == {0, 1} and 400 < flips[0].sum() < 600
    np.testing.assert_array_equal(flips[0] + flips[1], np.ones(1000))
    np.testing.assert_array_equal(flips[0], flips[2])
    np.testing.assert_array_equal(flips[1], flips[3])
    assert not np.array_equal(plans[0].choices[0], plans[2].choices[0])  # crops are drawn anew


def test_settled_choices_have_a_key_that_no_epoch_has(key):
    """Epochs count from 1, and 0 is the key of what is drawn once for the whole run."""
    flips = (AlternatingFlip(), AlternatingFlip())
    plan = plan_epoch(key, jnp.int32(3), IndependentSampling(), flips, 100, 8, 8)
    for i, (flip, choice) in enumerate(zip(flips, plan.choices, strict=True)):
        expected = flip.choices_for_epoch(jax.random.fold_in(jax.random.fold_in(key, 0), i), jnp.int32(3), 100)
        np.testing.assert_array_equal(choice, expected)


def test_what_is_left_out_is_the_posts():
    assert (Crop(), Cutout(), GroupedSampling()) == (Crop(4), Cutout(8), GroupedSampling(200))


def test_the_least_that_parts_take(key):
    images, first = jnp.asarray(images_of(2, 8)), (jnp.zeros(2, jnp.int32),)
    np.testing.assert_array_equal(augment(images, (Crop(0),), first), images)
    np.testing.assert_array_equal(augment(images, (Cutout(1),), first), images.at[:, 0, 0].set(0))
    [choices] = plan_epoch(key, jnp.int32(1), GroupedSampling(1), (Crop(1),), 10, 8, 8).choices
    assert len(set(choices.tolist())) == 1
