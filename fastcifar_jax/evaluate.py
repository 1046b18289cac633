"""Prediction in chunks, and test-time augmentation."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from fastcifar_jax.losses import num_correct
from fastcifar_jax.types import Evaluation, Images, Labels, Logits, Pixels

Predict = Callable[[Images], Logits]

CHUNK = 2000  # test images at a time


class TTA(Protocol):
    """The type of `Recipe.tta`: the logits of a batch from several views of it."""

    def __call__(self, predict: Predict, images: Images) -> Logits:
        """The logits of `images`, computed with `predict`."""
        ...


@dataclasses.dataclass(frozen=True)
class NoTTA:
    """The unchanged image, for data whose mirror images have another meaning."""

    def __call__(self, predict: Predict, images: Images) -> Logits:
        """Logits."""
        return predict(images)


@dataclasses.dataclass(frozen=True)
class FlipTTA:
    """The mean logits of the image and its mirror image (Bag of Tricks, "test-time augmentation"; section 6).

    Logits are averaged, not probabilities.
    """

    def __call__(self, predict: Predict, images: Images) -> Logits:
        """Mean logits, in the dtype of the logits."""
        return (predict(images) + predict(images[:, :, ::-1])) / 2


@dataclasses.dataclass(frozen=True)
class SixViewTTA:
    """The image and its mirror image with weight 1/4 each, two shifted ones and theirs with 1/8.

    Logits are averaged, not probabilities. The image is shifted up and left, and down and right, over its reflection
    (airbench.md, section 7).

    Attributes:
      shift: in pixels.
    """

    shift: int = 1

    def __post_init__(self):
        if self.shift < 1:
            raise ValueError(f"SixViewTTA has shift {self.shift}; give a number of pixels >= 1")

    def __call__(self, predict: Predict, images: Images) -> Logits:
        """Weighted mean of the logits, in their dtype."""
        both_ways = lambda views: (predict(views) + predict(views[:, :, ::-1])) / 2
        _, height, width, _ = images.shape
        if self.shift >= min(height, width):
            raise ValueError(
                f"SixViewTTA shifts by {self.shift} pixels; images of {height}x{width} can be shifted by fewer"
            )
        edge = (self.shift, self.shift)
        padded = jnp.pad(images, ((0, 0), edge, edge, (0, 0)), mode="reflect")
        first, last = padded[:, :height, :width], padded[:, -height:, -width:]
        return both_ways(images) / 2 + (both_ways(first) + both_ways(last)) / 4


def evaluate(
    predict: Predict,
    loss: Callable[[Logits, Labels], Logits],
    tta: TTA | None,
    normalize: Callable[[Pixels], Images],
    pixels: Pixels,
    labels: Labels,
    chunk: int = CHUNK,
) -> Evaluation:
    """Loss and correct answers over a test set, plain and, if asked for, with test-time augmentation.

    Args:
      predict: logits of normalised images; batch norm in evaluation mode, so that chunks do not matter.
      loss: per example.
      tta: the augmentation, whose plain pass is computed once for both results; None leaves it out.
      normalize: of the recipe.
      pixels: the test images, neither padded nor cropped.
      labels: one per image.
      chunk: images at a time.
    """

    def sums(pixels, labels):
        images = normalize(pixels)
        score = lambda logits: (loss(logits, labels).sum(), num_correct(logits, labels))
        return Evaluation(*score(predict(images)), *((None, None) if tta is None else score(tta(predict, images))))

    parts = in_chunks(sums, (pixels, labels), lambda stacked: stacked.sum(0), chunk)
    return jax.tree.map(lambda *x: sum(x), *parts)


def in_chunks(
    f: Callable[..., Any], arrays: tuple[Array, ...], merge: Callable[[Array], Array], chunk: int = CHUNK
) -> list[Any]:
    """The results of a function for all full chunks of many examples, in sequence, and for the remainder.

    Args:
      f: `f(*arrays)` for some examples.
      arrays: of equal length, at least 1.
      merge: combines an array of results, stacked over the full chunks.
      chunk: examples at a time.

    Returns:
      One or two results.
    """
    count = len(arrays[0])
    whole = count - count % chunk
    parts = []
    if whole:
        chunks = tuple(x[:whole].reshape(-1, chunk, *x.shape[1:]) for x in arrays)
        parts.append(jax.tree.map(merge, lax.map(lambda c: f(*c), chunks)))
    if whole < count:
        parts.append(f(*(x[whole:] for x in arrays)))
    return parts
