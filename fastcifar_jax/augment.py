"""Augmentations, and the sampling of their options for an epoch.

An augmentation is a finite list of options and a function that applies one of them to one image. The choices for a
whole epoch are drawn at once, a few bytes per image; the pixels are computed per batch, inside the training step.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from fastcifar_jax.types import Images, Pixels

Image = Float[Array, "height width channels"]  # normalised: 0 is the mean colour


class Augmentation(Protocol):
    """The type of each of `Recipe.augmentations`."""

    def options(self, height: int, width: int) -> np.ndarray:
        """All options for images of this size: an array whose rows are the options."""
        ...

    def __call__(self, image: Image, option: Array) -> Image:
        """One image with one option applied; must be traceable under `jax.vmap`."""
        ...


@runtime_checkable
class EpochDependent(Protocol):
    """An augmentation whose choices depend on other epochs; takes precedence over `Recipe.sampling`."""

    def choices_for_epoch(self, key: PRNGKeyArray, epoch: Int[Array, ""], num_images: int) -> Int[Array, " images"]:
        """For each image a row of `options`, in an epoch (1-based); `key` is the same in every epoch."""
        ...


class EpochPlan(NamedTuple):
    """The order of an epoch's images and the option that each image gets from each augmentation."""

    order: Int[Array, " images"]  # position in the epoch -> image
    choices: tuple[Int[Array, " images"], ...]  # per augmentation: image -> row of its options


class Sampling(Protocol):
    """The type of `Recipe.sampling`: makes the plan of an epoch."""

    def __call__(
        self, key: PRNGKeyArray, augmentations: tuple[Augmentation, ...], num_images: int, height: int, width: int
    ) -> EpochPlan:
        """The plan of one epoch for `num_images` images of `height` x `width` pixels."""
        ...


@dataclasses.dataclass(frozen=True)
class Crop:
    """Reflect-pads by `padding` pixels and cuts a window of the original size at a random position.

    Attributes:
      padding: pixels on each side; the edge pixel is not repeated. 4 gives 9 x 9 = 81 options.

    Example:
      >>> image = jnp.arange(9.0).reshape(3, 3, 1)
      >>> crop = Crop(padding=1)
      >>> crop(image, crop.options(3, 3)[0])[:, :, 0].tolist()
      [[4.0, 3.0, 4.0], [1.0, 0.0, 1.0], [4.0, 3.0, 4.0]]
    """

    padding: int = 4

    def __post_init__(self):
        if self.padding < 0:
            raise ValueError(f"Crop has padding {self.padding}; give a number of pixels >= 0")

    def options(self, height: int, width: int) -> np.ndarray:
        """Rows of (x0, y0) in the padded image, x0 in the outer loop."""
        if self.padding >= min(height, width):
            raise ValueError(f"Crop pads by {self.padding} pixels; images of {height}x{width} can reflect fewer")
        offsets = range(2 * self.padding + 1)
        return np.array([(x0, y0) for x0 in offsets for y0 in offsets], np.int32)

    def __call__(self, image: Image, option: Array) -> Image:
        """The window at `option`."""
        pad = (self.padding, self.padding)
        padded = jnp.pad(image, (pad, pad, (0, 0)), mode="reflect")
        channel = jnp.zeros_like(option[0])  # a literal 0 would be int64 in 64-bit mode, beside int32
        return lax.dynamic_slice(padded, (option[1], option[0], channel), image.shape)


@dataclasses.dataclass(frozen=True)
class Flip:
    """Mirrors left and right, or not: 2 options."""

    def options(self, height: int, width: int) -> np.ndarray:
        """True: mirrored."""
        del height, width
        return np.array([True, False])

    def __call__(self, image: Image, option: Array) -> Image:
        """The image, mirrored if `option`."""
        return jnp.where(option, image[:, ::-1], image)


@dataclasses.dataclass(frozen=True)
class AlternatingFlip(Flip):
    """Mirrors a random half in the first epoch, the others in the second, and so on (airbench.md, section 4).

    Each pair of epochs shows every image both ways. With `Flip`, half of the images look the same in both epochs.
    """

    def choices_for_epoch(self, key: PRNGKeyArray, epoch: Int[Array, ""], num_images: int) -> Int[Array, " images"]:
        """1 for an image that is mirrored in this epoch."""
        first = jax.random.bernoulli(key, 0.5, (num_images,))
        return jnp.where(epoch % 2 == 1, first, ~first).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Cutout:
    """Sets a square inside the image to 0 in normalised units, the mean colour.

    Attributes:
      size: height and width of the square, in pixels. 8 on 32x32 gives 25 x 25 = 625 options.

    Example:
      >>> Cutout(size=2)(jnp.ones((3, 3, 1)), jnp.array([1, 0]))[:, :, 0].tolist()
      [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
    """

    size: int = 8

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"Cutout has size {self.size}; give a number of pixels >= 1")

    def options(self, height: int, width: int) -> np.ndarray:
        """Rows of (x0, y0), the upper left corner, x0 in the outer loop."""
        if self.size > min(height, width):
            raise ValueError(f"Cutout of {self.size} pixels does not fit into images of {height}x{width}")
        xs, ys = range(width - self.size + 1), range(height - self.size + 1)
        return np.array([(x0, y0) for x0 in xs for y0 in ys], np.int32)

    def __call__(self, image: Image, option: Array) -> Image:
        """The image without the square at `option`."""
        height, width, _ = image.shape
        x, y = (jnp.arange(n, dtype=option.dtype) - first for n, first in zip((width, height), option, strict=True))
        inside = ((0 <= y) & (y < self.size))[:, None] & ((0 <= x) & (x < self.size))[None, :]
        return jnp.where(inside[:, :, None], jnp.zeros((), image.dtype), image)


@dataclasses.dataclass(frozen=True)
class IndependentSampling:
    """An independent uniform option for each image and augmentation, and a shuffled order (section 2.4)."""

    def __call__(
        self, key: PRNGKeyArray, augmentations: tuple[Augmentation, ...], num_images: int, height: int, width: int
    ) -> EpochPlan:
        """The plan of one epoch."""
        key_order, *keys = jax.random.split(key, len(augmentations) + 1)
        choices = tuple(
            jax.random.randint(key, (num_images,), 0, len(augmentation.options(height, width)))
            for key, augmentation in zip(keys, augmentations, strict=True)
        )
        [order] = permutations(key_order, [num_images])
        return EpochPlan(order, choices)


@dataclasses.dataclass(frozen=True)
class GroupedSampling:
    """Shuffles the images and splits them into one group per option, for each augmentation in turn (section 2.3).

    The groups' sizes differ by at most one, so exactly half of an even number of images are flipped. The original
    rebuilds the whole data set for each transform, shuffled each time. A shuffled permutation is a new one, independent
    of the one before, so independent permutations give batches of the same distribution.

    Attributes:
      max_options: limit of the options per augmentation that are used in one epoch, drawn at random; None for all.
    """

    max_options: int | None = 200

    def __post_init__(self):
        if self.max_options is not None and self.max_options < 1:
            raise ValueError(f"GroupedSampling has max_options {self.max_options}; give a number >= 1 or None")

    def __call__(
        self, key: PRNGKeyArray, augmentations: tuple[Augmentation, ...], num_images: int, height: int, width: int
    ) -> EpochPlan:
        """The plan of one epoch."""
        count = len(augmentations)
        options = [len(augmentation.options(height, width)) for augmentation in augmentations]
        shuffled = permutations(key, [num_images] * (count + 1) + options)
        choices = []
        for images, kept in zip(shuffled[1 : count + 1], shuffled[count + 1 :], strict=True):
            kept = kept[: self.max_options]
            group = _groups(num_images, len(kept))
            choices.append(jnp.zeros(num_images, kept.dtype).at[images].set(kept[group], unique_indices=True))
        return EpochPlan(shuffled[0], tuple(choices))


def permutations(key: PRNGKeyArray, sizes: Sequence[int]) -> list[Int[Array, " size"]]:
    """Independent uniform permutations of `range(size)` for each size, by one sort.

    `jax.random.permutation` sorts twice for each of them, and XLA takes many seconds to compile a sort for a GPU. Two
    of n keys are equal, which would favour an order, with a probability of n^2 / 2^65.
    """
    shape = (len(sizes), max(sizes))
    high, low = jax.random.bits(key, (2, *shape), jnp.uint32)
    index = lax.broadcasted_iota(jnp.int32, shape, 1)
    outside = (index >= np.array(sizes, np.int32)[:, None]).astype(jnp.uint32)  # sorts last
    *_, found = lax.sort((outside, high, low, index), num_keys=3)
    return [row[:size] for row, size in zip(found, sizes, strict=True)]


def plan_epoch(
    key: PRNGKeyArray,
    epoch: Int[Array, ""],
    sampling: Sampling,
    augmentations: tuple[Augmentation, ...],
    num_images: int,
    height: int,
    width: int,
) -> EpochPlan:
    """The plan of an epoch of a run: drawn per epoch, except for augmentations that are `EpochDependent`.

    Args:
      key: of the run's data.
      epoch: 1-based.
      sampling: of the recipe.
      augmentations: of the recipe.
      num_images: number of training images.
      height: of an image, in pixels.
      width: of an image, in pixels.
    """
    plan = sampling(jax.random.fold_in(key, epoch), augmentations, num_images, height, width)
    key_dependent = jax.random.fold_in(key, 0)  # epochs count from 1
    dependent = tuple(
        augmentation.choices_for_epoch(jax.random.fold_in(key_dependent, i), epoch, num_images)
        if isinstance(augmentation, EpochDependent)
        else choice
        for i, (augmentation, choice) in enumerate(zip(augmentations, plan.choices, strict=True))
    )
    return plan._replace(choices=dependent)


def _groups(num_images: int, num_groups: int) -> Int[Array, " images"]:
    """Position -> group: consecutive groups whose sizes differ by at most one, larger groups first."""
    small, larger = divmod(num_images, num_groups)  # the first `larger` groups hold `small + 1` images
    position, border = jnp.arange(num_images), larger * (small + 1)
    return jnp.where(position < border, position // (small + 1), larger + (position - border) // max(small, 1))


def normalize(pixels: Pixels, mean: tuple[float, ...], std: tuple[float, ...], dtype=jnp.float32) -> Images:
    """`(pixel - mean) / std` per channel, computed in `dtype`.

    In float16 the constants are rounded first, as in the original: mean (125.3125, 122.9375, 113.875), std (63,
    62.09375, 66.6875) for CIFAR-10.

    Args:
      pixels: 0..255.
      mean: per channel, in 0..255.
      std: per channel, in 0..255.
      dtype: of the result.
    """
    over_maps = lambda constant: jnp.asarray(constant, dtype)[None, None, None, :]
    return (pixels.astype(dtype) - over_maps(mean)) / over_maps(std)


def augment(
    images: Images, augmentations: tuple[Augmentation, ...], choices: tuple[Int[Array, " batch"], ...]
) -> Images:
    """Applies to each image its option of each augmentation, in order.

    Args:
      images: normalised.
      augmentations: in the order they are applied.
      choices: per augmentation, for each image a row of its options.
    """
    _, height, width, _ = images.shape
    for augmentation, choice in zip(augmentations, choices, strict=True):
        images = jax.vmap(augmentation)(images, jnp.asarray(augmentation.options(height, width))[choice])
    return images
