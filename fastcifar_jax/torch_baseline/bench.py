"""Training steps of a recipe in PyTorch, to be timed."""

from collections.abc import Callable

import torch

from fastcifar_jax.ops import backend
from fastcifar_jax.recipe import Recipe
from fastcifar_jax.torch_baseline.augment import make_batch, plan_epoch, to_device
from fastcifar_jax.torch_baseline.train import available_cores, check_trainable, set_up
from fastcifar_jax.types import Dataset


def prepare(
    recipe: Recipe, num_classes: int, dataset: Dataset, *, compiled: bool, tuned: bool
) -> tuple[Callable[[int], None], bool]:
    """A function that takes as many steps of an epoch as its argument says, and whether on a GPU.

    `compiled` puts the network through `torch.compile`; `tuned` keeps freed memory, as for JAX.

    Raises:
      ValueError: a recipe that PyTorch cannot train.
    """
    check_trainable(recipe)
    if tuned:
        backend.keep_freed_memory()
    torch.set_num_threads(available_cores())
    data, trainer = set_up(recipe, num_classes, 0, dataset, None, compiled)
    on_gpu = data.train_images.is_cuda
    plan = to_device(plan_epoch(recipe, 0, 1, *data.train_images.shape[:3]), data.train_images.device)
    batches = plan.order.split(recipe.batch_size)[: trainer.steps_per_epoch]

    def take(num_steps: int) -> None:
        for step in range(num_steps):
            ids = batches[step % len(batches)]
            trainer.step(make_batch(recipe, data.train_images, plan, ids, trainer.dtype), data.train_labels[ids])
        if on_gpu:
            torch.cuda.synchronize()

    return take, on_gpu
