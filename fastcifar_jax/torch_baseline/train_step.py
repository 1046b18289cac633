"""The state of a run in PyTorch, and one step that changes it."""

import copy

import torch
from torch import Tensor, nn

from fastcifar_jax.recipe import Recipe
from fastcifar_jax.torch_baseline.evaluate import num_correct, predict, summed_loss
from fastcifar_jax.torch_baseline.models import make_network
from fastcifar_jax.torch_baseline.optim import make_optimizers, take_step, update_average
from fastcifar_jax.types import StepInfo


class Trainer:
    """A network with its optimisers and its average, which `step` trains in place.

    Attributes:
      network: the trained network.
      average: a copy that the recipe's average keeps; None without one.
      optimizers: `ScheduledOptimizer`s.
      dtype: of weights and images.
      count: steps taken.
    """

    def __init__(
        self,
        recipe: Recipe,
        num_classes: int,
        steps_per_epoch: int,
        seed: int = 0,
        device: str | torch.device = "cpu",
        compiled: bool = False,
    ):
        self.recipe, self.steps_per_epoch, self.count = recipe, steps_per_epoch, 0
        self.dtype = torch.float64 if recipe.compute_dtype == "float64" else torch.float32
        self.network = make_network(recipe.model, num_classes, seed, torch.device(device), self.dtype)
        self.average = copy.deepcopy(self.network) if recipe.average else None
        self.optimizers = make_optimizers(recipe, self.network, steps_per_epoch)
        self._forward = torch.compile(self.network) if compiled else self.network
        if self.average is not None:
            self._slow, self._fast = averaged_tensors(self.average), averaged_tensors(self.network)

    @property
    def eval_network(self) -> nn.Module:
        """The network that evaluation uses: the average if the recipe has one."""
        return self.network if self.average is None else self.average

    def step(self, images: Tensor, labels: Tensor) -> StepInfo:
        """Forward, backward, update, average; returns sums over the batch, of the pass that was differentiated.

        `images` are normalised and augmented, `[batch, 3, height, width]`.
        """
        logits = predict(self.recipe, self._forward, images)
        loss = summed_loss(self.recipe, logits, labels)
        self.network.zero_grad(set_to_none=True)
        loss.backward()
        take_step(self.optimizers, self.count)
        self.count += 1
        if self.average is not None:
            with torch.no_grad():
                update_average(self.recipe, self._slow, self._fast, self.count, self.steps_per_epoch)
        return StepInfo(loss.detach(), num_correct(logits, labels))


def averaged_tensors(network: nn.Module) -> list[Tensor]:
    """What an average covers: trained parameters and running statistics."""
    return [*(p for p in network.parameters() if p.requires_grad), *network.buffers()]
