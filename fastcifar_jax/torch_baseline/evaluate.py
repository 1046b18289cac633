"""Predictions, losses and evaluation in PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcifar_jax.evaluate import CHUNK, NoTTA, SixViewTTA
from fastcifar_jax.recipe import Recipe
from fastcifar_jax.torch_baseline.augment import normalize
from fastcifar_jax.types import Evaluation


def predict(recipe: Recipe, network: nn.Module, images: Tensor) -> Tensor:
    """Logits in the dtype of the images; half-precision recipes use autocast."""
    dtype = {"float16": torch.float16, "mixed": torch.bfloat16, "bfloat16": torch.bfloat16}.get(recipe.compute_dtype)
    with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
        logits = network(images)
    return logits.to(images.dtype)


def predict_views(recipe: Recipe, network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of the images, plain and averaged over the views of the recipe's test-time augmentation."""
    both = lambda plain, x: (plain + predict(recipe, network, x.flip(3))) / 2
    plain = predict(recipe, network, images)
    if isinstance(recipe.tta, NoTTA):
        return plain, plain
    views = both(plain, images)
    if isinstance(recipe.tta, SixViewTTA):
        padded, (height, width) = F.pad(images, [recipe.tta.shift] * 4, mode="reflect"), images.shape[2:]
        shifted = (padded[:, :, :height, :width], padded[:, :, -height:, -width:])
        views = views / 2 + sum(both(predict(recipe, network, view), view) for view in shifted) / 4
    return plain, views


def summed_loss(recipe: Recipe, logits: Tensor, labels: Tensor) -> Tensor:
    """The recipe's loss, summed over the batch."""
    return F.cross_entropy(logits, labels, label_smoothing=recipe.loss.label_smoothing, reduction="sum")


def num_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """How many rows have their largest logit at the label."""
    return (logits.argmax(1) == labels).sum()


@torch.no_grad()
def evaluate(recipe: Recipe, network: nn.Module, images: Tensor, labels: Tensor, with_tta: bool = True) -> Evaluation:
    """Loss and correct answers over a test set, as Python numbers; None where there is no test-time augmentation.

    `images` are uint8, `[n, height, width, 3]`; the network is left in evaluation mode.
    """
    network.eval()
    sums = []
    for pixels, y in zip(images.split(CHUNK), labels.split(CHUNK), strict=True):
        x = normalize(recipe, pixels, network.linear.weight.dtype)
        found = predict_views(recipe, network, x) if with_tta else (predict(recipe, network, x),)
        scores = [score for logits in found for score in (summed_loss(recipe, logits, y), num_correct(logits, y))]
        sums.append(torch.stack([score.double() for score in scores]))
    found = torch.stack(sums).sum(0).tolist()
    return Evaluation(*found, *(None,) * (4 - len(found)))
