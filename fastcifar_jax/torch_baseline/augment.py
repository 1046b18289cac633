"""The plan of an epoch and the images of its batches in PyTorch."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastcifar_jax.augment import AlternatingFlip, Cutout, Flip, GroupedSampling
from fastcifar_jax.recipe import Recipe


class EpochPlan(NamedTuple):
    """The order of an epoch's images and the option that each image gets from each augmentation."""

    order: Tensor  # position in the epoch -> image
    options: tuple[Tensor, ...]  # one tensor per augmentation: image -> its row of `augmentation.options`


def plan_epoch(recipe: Recipe, seed: int, epoch: int, num_images: int, height: int, width: int) -> EpochPlan:
    """The plan of one epoch of a run, on the CPU (sections 2.3 and 2.4 of the specification).

    The numbers differ from JAX's; their distribution is the same. `epoch` is 1-based.
    """
    generator = _generator(seed, epoch)
    shuffled = lambda n: torch.randperm(n, generator=generator)
    order, options = torch.arange(num_images), []
    for i, augmentation in enumerate(recipe.augmentations):
        table = torch.from_numpy(augmentation.options(height, width))
        if isinstance(augmentation, AlternatingFlip):
            first = torch.rand(num_images, generator=_generator(seed, 0, i)) < 0.5  # the same in every epoch
            options.append(first ^ (epoch % 2 == 0))
            continue
        if isinstance(recipe.sampling, GroupedSampling):
            order = order[shuffled(num_images)]
            kept = shuffled(len(table))[: recipe.sampling.max_options]
            sizes = num_images // len(kept) + (torch.arange(len(kept)) < num_images % len(kept))
            choice = torch.empty_like(order)
            choice[order] = kept.repeat_interleave(sizes)
        else:
            choice = torch.randint(len(table), (num_images,), generator=generator)
        options.append(table[choice])
    return EpochPlan(order[shuffled(num_images)], tuple(options))


def to_device(plan: EpochPlan, device: torch.device) -> EpochPlan:
    """The plan on a device."""
    return EpochPlan(plan.order.to(device), tuple(option.to(device) for option in plan.options))


def _generator(*seeds):
    return torch.Generator().manual_seed(int(np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0]))


def normalize(recipe: Recipe, pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """`(pixel - mean) / std`: `[n, height, width, 3]` uint8 -> `[n, 3, height, width]`, in NHWC memory."""
    mean, std = (torch.tensor(constant, dtype=dtype, device=pixels.device) for constant in (recipe.mean, recipe.std))
    return pixels.to(dtype).sub_(mean).div_(std).permute(0, 3, 1, 2)


def make_batch(recipe: Recipe, images: Tensor, plan: EpochPlan, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Augmented and normalised images.

    Crops and flips are composed into the source row and column of each pixel, so that one gather does them all;
    cutouts are masks that move with the crops and flips after them.

    Args:
      recipe: its augmentations are applied in their order.
      images: the whole split, uint8, `[n, height, width, 3]`.
      plan: of the epoch.
      ids: indices of the images of the batch.
      dtype: of the result.

    Returns:
      `[batch, 3, height, width]` in channels-last memory.
    """
    sides = images.shape[1:3]
    here = [torch.arange(side, device=images.device).expand(len(ids), side) for side in sides]  # rows, columns
    source, masks = here, []
    for augmentation, option in zip(recipe.augmentations, plan.options, strict=True):
        option = option[ids]
        if isinstance(augmentation, Flip):  # alternating or not
            moved = [here[0], torch.where(option[:, None], sides[1] - 1 - here[1], here[1])]
        else:
            corner = option.flip(1)[:, :, None].unbind(1)  # (x, y) -> rows, columns
            offsets = [place - first for place, first in zip(here, corner, strict=True)]
            if isinstance(augmentation, Cutout):
                masks.append([(0 <= offset) & (offset < augmentation.size) for offset in offsets])
                continue
            moved = [
                _reflect(place + first - augmentation.padding, side)
                for place, first, side in zip(here, corner, sides, strict=True)
            ]
        follow = lambda pair, moved=moved: [x.gather(1, to) for x, to in zip(pair, moved, strict=True)]
        source, masks = follow(source), [follow(mask) for mask in masks]
    rows, columns = source
    batch = normalize(recipe, images[ids[:, None, None], rows[:, :, None], columns[:, None, :]], dtype)
    for rows, columns in masks:
        batch.permute(0, 2, 3, 1).masked_fill_((rows[:, :, None] & columns[:, None, :])[..., None], 0.0)
    return batch


def _reflect(place, side):
    """Places outside 0..side - 1 reflected at both ends, whose pixels are not repeated."""
    return (side - 1) - ((side - 1) - place.abs()).abs()
