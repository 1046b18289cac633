"""An epoch's plan and the pixels of its batches in PyTorch."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastcifar_jax.augment import AlternatingFlip, Cutout, Flip, GroupedSampling
from fastcifar_jax.recipe import Recipe
from fastcifar_jax.torch_baseline.network import normalize


class Plan(NamedTuple):
    """The order of an epoch's images and what each augmentation does to each image."""

    order: Tensor  # position in the epoch -> image
    options: tuple[Tensor, ...]  # one an augmentation: image -> its row of `augmentation.options`


def draw_first_flips(recipe: Recipe, num_images: int, generator: torch.Generator) -> tuple[Tensor | None, ...]:
    """For each augmentation which images it mirrors in the first epoch of a run, if it alternates."""
    return tuple(
        torch.rand(num_images, generator=generator) < 0.5 if isinstance(augmentation, AlternatingFlip) else None
        for augmentation in recipe.augmentations
    )


def draw_plan(
    recipe: Recipe,
    num_images: int,
    height: int,
    width: int,
    generator: torch.Generator,
    epoch: int = 1,
    first_flips: tuple[Tensor | None, ...] = (),
) -> Plan:
    """The plan of one epoch, drawn as `recipe.sampling` says (sections 2.3 and 2.4 of the specification).

    The draws are not JAX's, their distribution is the same.

    Args:
      recipe: whose augmentations to choose for.
      num_images: training images.
      height: of an image, in pixels.
      width: of an image, in pixels.
      generator: on the CPU, whatever the images are on.
      epoch: 1-based.
      first_flips: of `draw_first_flips`; drawn here when empty.
    """
    first_flips = first_flips or draw_first_flips(recipe, num_images, generator)
    shuffled = lambda n: torch.randperm(n, generator=generator)
    order, options = torch.arange(num_images), []
    for augmentation, first_flip in zip(recipe.augmentations, first_flips, strict=True):
        table = torch.from_numpy(augmentation.options(height, width))
        if isinstance(augmentation, AlternatingFlip):
            choice = (first_flip ^ (epoch % 2 == 0)).long()
        elif isinstance(recipe.sampling, GroupedSampling):
            order = order[shuffled(num_images)]
            kept = shuffled(len(table))[: recipe.sampling.max_options]
            sizes = num_images // len(kept) + (torch.arange(len(kept)) < num_images % len(kept))
            choice = torch.empty_like(order)
            choice[order] = kept.repeat_interleave(sizes)
        else:
            choice = torch.randint(len(table), (num_images,), generator=generator)
        options.append(table[choice])
    return Plan(order[shuffled(num_images)], tuple(options))


def make_batch(recipe: Recipe, images: Tensor, plan: Plan, ids: Tensor) -> Tensor:
    """Augmented and normalised images.

    Crops and flips are followed backwards to the row and column of the image that each row and column of the result
    shows, so that pixels are touched once; cutouts move with the crops and flips that come after them.

    Args:
      recipe: its augmentations are applied in their order.
      images: all of them, uint8, `[n, height, width, 3]`.
      plan: of the epoch.
      ids: of the images of the batch.

    Returns:
      `[batch, 3, height, width]`, float32, in channels-last memory.
    """
    sides = images.shape[1:3]
    here = [torch.arange(side, device=images.device).expand(len(ids), side) for side in sides]  # rows, columns
    source, holes = here, []
    for augmentation, option in zip(recipe.augmentations, plan.options, strict=True):
        option = option[ids]
        if isinstance(augmentation, Flip):  # alternating or not
            moved = [here[0], torch.where(option[:, None], sides[1] - 1 - here[1], here[1])]
        else:
            corner = option.flip(1)[:, :, None].unbind(1)  # (x, y) -> rows, columns
            if isinstance(augmentation, Cutout):
                inside = lambda offset, size=augmentation.size: (0 <= offset) & (offset < size)
                holes.append([inside(place - first) for place, first in zip(here, corner, strict=True)])
                continue
            moved = [
                _reflect(place + first - augmentation.padding, side)
                for place, first, side in zip(here, corner, sides, strict=True)
            ]
        follow = lambda pair, moved=moved: [x.gather(1, to) for x, to in zip(pair, moved, strict=True)]
        source, holes = follow(source), [follow(hole) for hole in holes]
    rows, columns = source
    batch = normalize(recipe, images[ids[:, None, None], rows[:, :, None], columns[:, None, :]])
    for rows, columns in holes:
        batch.permute(0, 2, 3, 1).masked_fill_((rows[:, :, None] & columns[:, None, :])[..., None], 0.0)
    return batch


def _reflect(place, side):
    """Places outside of 0..side - 1 seen in the mirrors at both ends; the end itself is not repeated."""
    return (side - 1) - ((side - 1) - place.abs()).abs()
