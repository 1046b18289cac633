"""A run in PyTorch as an iterator over its epochs. Nothing here was ever run on a CUDA device."""

import contextlib
import functools
import math
import operator
import os
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch

from fastcifar_jax.augment import AlternatingFlip, Crop, Cutout, Flip, GroupedSampling, IndependentSampling
from fastcifar_jax.averaging import Ema, Lookahead
from fastcifar_jax.evaluate import FlipTTA, NoTTA, SixViewTTA
from fastcifar_jax.functions import steps_of_epochs
from fastcifar_jax.losses import CrossEntropy
from fastcifar_jax.models.activations import Celu, Gelu, Relu
from fastcifar_jax.models.airnet import AirNet
from fastcifar_jax.models.layers import BatchNormConfig
from fastcifar_jax.models.resnet9 import ResNet9
from fastcifar_jax.muon import Muon
from fastcifar_jax.optim import AirbenchSGD, Nesterov
from fastcifar_jax.recipe import Recipe, resolve_dtype
from fastcifar_jax.torch_baseline.augment import EpochPlan, make_batch, normalize, plan_epoch, to_device
from fastcifar_jax.torch_baseline.evaluate import CHUNK, evaluate
from fastcifar_jax.torch_baseline.models import set_whitening_filters
from fastcifar_jax.torch_baseline.train_step import Trainer
from fastcifar_jax.train import Diverged, OnSteps
from fastcifar_jax.types import Dataset, EpochInfo, Snapshot, StepInfo

REPORT_SECONDS = 1.0  # between two reports of progress
Device = str | torch.device | None  # None: CUDA if PyTorch has it, else the CPU

KNOWN_PARTS = {  # in this order: another model need not have the parts below it
    "model": (ResNet9, AirNet),
    "model.norm": (BatchNormConfig,),
    "model.activation": (Relu, Celu, Gelu),
    "loss": (CrossEntropy,),
    "augmentations": (Crop, Flip, AlternatingFlip, Cutout),
    "sampling": (IndependentSampling, GroupedSampling),
    "optim": (Nesterov, AirbenchSGD, Muon),
    "average": (Ema, Lookahead, type(None)),
    "tta": (FlipTTA, SixViewTTA, NoTTA),
}


def versions() -> dict[str, str]:
    """The versions that numbers depend on besides those of every record."""
    return {"torch": torch.__version__}


def check_trainable(recipe: Recipe) -> None:
    """Checks that every part of a recipe exists in PyTorch.

    Raises:
      ValueError: a part does not; the message names it.
    """
    for name, known in KNOWN_PARTS.items():
        part = operator.attrgetter(name)(recipe)
        for item in part if name == "augmentations" else (part,):
            if type(item) not in known:  # a subclass may do anything
                names = ", ".join("None" if kind is type(None) else kind.__name__ for kind in known)
                raise ValueError(
                    f"recipe {recipe.name!r} has {name} {item!r}; the PyTorch baseline has {names}: train it with JAX, "
                    "or add the part to fastcifar_jax/torch_baseline"
                )
    norm = recipe.model.norm
    if recipe.batch_size % norm.num_groups:
        raise ValueError(
            f"a batch of {recipe.batch_size} images is not {norm.num_groups} equal ghost groups; change batch_size"
        )
    if isinstance(recipe.optim, Muon) and norm.train_scale:
        raise ValueError("Muon cannot train the scales of norms; set model.norm.train_scale to False")


def train_epochs(
    recipe: Recipe,
    num_classes: int,
    seed: int,
    dataset: Dataset,
    *,
    device: Device = None,
    tta_every_epoch: bool = False,
    on_steps: OnSteps | None = None,
) -> Iterator[Snapshot]:
    """A run as an iterator, like `fastcifar_jax.train.train_epochs`.

    The same seed, recipe, data and machine give bitwise the same numbers on a CPU, which are never JAX's; on a GPU
    some of PyTorch's kernels add in any order. The compute dtypes "mixed" and "bfloat16" are both autocast to bfloat16,
    "float16" to float16, over float32 master weights: maps have this dtype; logits, losses and statistics are float32.

    Training seconds count drawing the plan and all steps; setup seconds count the transfer to the device,
    initialisation and whitening.

    Args:
      recipe: what to run.
      num_classes: size of the logits.
      seed: of the run.
      dataset: NumPy arrays.
      device: where to run; on a CPU with one thread per core that the process may use.
      tta_every_epoch: whether to evaluate with test-time augmentation after every epoch, not only after the last.
      on_steps: called with the epoch and its finished steps about once per second.

    Yields:
      A `Snapshot` per epoch, whose state is the state dict of the network that is evaluated. The next epoch changes
      it: copy what is kept.

    Raises:
      Diverged: at the end of an epoch whose loss is not finite.
      ValueError: a recipe that PyTorch cannot train, or that does not fit the data.
    """
    recipe = resolve_dtype(recipe)
    check_trainable(recipe)
    with all_cores():
        seed_weights, seed_plans = map(int, np.random.SeedSequence(seed).generate_state(2))
        began = time.perf_counter()
        data, trainer = set_up(recipe, num_classes, seed_weights, dataset, device)
        if data.train_images.is_cuda:
            torch.cuda.synchronize()
        setup_seconds = time.perf_counter() - began
        rows: tuple[EpochInfo, ...] = ()
        steps = steps_of_epochs(recipe, trainer.steps_per_epoch)
        for epoch, num_steps in enumerate(steps, start=1):
            began = time.perf_counter()
            plan = plan_epoch(recipe, seed_plans, epoch, *data.train_images.shape[:3])
            totals = _train_epoch(trainer, data, plan, num_steps, on_steps and functools.partial(on_steps, epoch))
            seconds = time.perf_counter() - began
            with_tta = tta_every_epoch or epoch == len(steps)
            sums = evaluate(recipe, trainer.eval_network, data.test_images, data.test_labels, with_tta)
            train = [x / (num_steps * recipe.batch_size) for x in totals]
            test = [None if x is None else x / len(data.test_labels) for x in sums]
            rows = (*rows, EpochInfo(epoch, seconds, *train, *test))
            if not (math.isfinite(rows[-1].train_loss) and math.isfinite(rows[-1].test_loss)):
                raise Diverged(recipe.name, rows)
            yield Snapshot(trainer.eval_network.state_dict(), rows, setup_seconds)


def warm_up(recipe: Recipe, num_classes: int, dataset: Dataset, device: Device = None) -> float:
    """Takes one step and one evaluation with a network that is thrown away; returns the seconds."""
    began = time.perf_counter()
    sizes = (recipe.batch_size, recipe.batch_size, CHUNK, CHUNK)
    few = Dataset(*(array[:size] for array, size in zip(dataset, sizes, strict=True)))
    with all_cores():
        data, trainer = set_up(recipe, num_classes, 0, few, device)
        _train_epoch(trainer, data, plan_epoch(recipe, 0, 1, *data.train_images.shape[:3]), 1)
        evaluate(recipe, trainer.eval_network, data.test_images, data.test_labels)
    return time.perf_counter() - began


def set_up(
    recipe: Recipe, num_classes: int, seed: int, dataset: Dataset, device: Device, compiled: bool = False
) -> tuple[Dataset, Trainer]:
    """The data as tensors on the device, and a trainer whose network has its whitening filters."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    # PyTorch warns of arrays that it could not write to.
    data = Dataset(*(torch.from_numpy(np.require(array, requirements=("C", "W"))).to(device) for array in dataset))
    data = data._replace(train_labels=data.train_labels.long(), test_labels=data.test_labels.long())
    if not (steps_per_epoch := len(data.train_labels) // recipe.batch_size):
        raise ValueError(
            f"batch_size {recipe.batch_size} is larger than the {len(data.train_labels)} training images; set it lower"
        )
    trainer = Trainer(recipe, num_classes, steps_per_epoch, seed, device, compiled)
    images = normalize(recipe, data.train_images[: recipe.init_images], trainer.dtype)
    for network in filter(None, (trainer.network, trainer.average)):
        set_whitening_filters(network, images)
    return data, trainer


def _train_epoch(
    trainer: Trainer, data: Dataset, plan: EpochPlan, num_steps: int, report: Callable[[int], None] | None = None
) -> StepInfo:
    """Takes the first steps of an epoch; returns the sums over their images, as Python numbers."""
    recipe, images, labels = trainer.recipe, data.train_images, data.train_labels
    plan = to_device(plan, images.device)
    trainer.network.train()
    totals = StepInfo(torch.tensor(0.0, device=images.device), torch.tensor(0, device=images.device))
    reported = time.perf_counter()
    for i, ids in enumerate(plan.order.split(recipe.batch_size)[:num_steps], start=1):
        info = trainer.step(make_batch(recipe, images, plan, ids, trainer.dtype), labels[ids])
        totals = StepInfo(totals.loss + info.loss, totals.correct + info.correct)
        if report is not None and time.perf_counter() - reported > REPORT_SECONDS:
            report(i)
            reported = time.perf_counter()
    return StepInfo(*(total.item() for total in totals))  # waits for the device


@contextlib.contextmanager
def all_cores() -> Iterator[None]:
    """PyTorch with as many threads as the process may use cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(available_cores())
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def available_cores() -> int:
    """How many cores the process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
