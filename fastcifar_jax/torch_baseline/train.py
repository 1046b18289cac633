"""The recipes of the ladder in PyTorch, at the best CPU settings we know.

`make_train` trains a recipe as `fastcifar_jax.train.make_train` does, for `compare final torch:final`; the step that
`bench --against torch` times is the same one. Needs the extra `compare`. Written from the same specification and driven
by the same `Recipe`, with the choices that make PyTorch fastest here: channels-last memory, ghost groups as contiguous
slices of the batch, one gather for all crops and flips, multi-tensor updates. `tests/reference/torch_resnet9.py` is the
exact twin; this one is the fast one.

On a CUDA device nothing here has been run: what this project could measure were CPUs.
"""

import copy
import functools
import math
import operator
import os
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastcifar_jax.augment import AlternatingFlip, Crop, Cutout, Flip, GroupedSampling, IndependentSampling
from fastcifar_jax.averaging import Ema, Lookahead
from fastcifar_jax.evaluate import FlipTTA, NoTTA, SixViewTTA
from fastcifar_jax.losses import CrossEntropy
from fastcifar_jax.models.activations import Celu, Gelu, Relu
from fastcifar_jax.models.airnet import AirNet
from fastcifar_jax.models.layers import BatchNormConfig
from fastcifar_jax.models.resnet9 import ResNet9
from fastcifar_jax.muon import Muon
from fastcifar_jax.optim import AirbenchSGD, Nesterov
from fastcifar_jax.recipe import Recipe, resolve_dtype
from fastcifar_jax.schedules import Triangle, WarmupDecay, count_steps
from fastcifar_jax.torch_baseline.airnet import AirNetwork, make_update
from fastcifar_jax.torch_baseline.batches import Plan, draw_first_flips, draw_plan, make_batch
from fastcifar_jax.torch_baseline.network import (
    TEST_CHUNK,  # fmt: skip
    Network,  # fmt: skip
    Step,  # fmt: skip
    evaluate,  # fmt: skip
    make_network,  # fmt: skip
    make_step,  # fmt: skip
    normalize,  # fmt: skip
    whitening_filters,  # fmt: skip
)
from fastcifar_jax.train import Diverged, steps_of_epochs
from fastcifar_jax.types import Dataset, EpochInfo, RunResult, StepInfo

_KNOWN = {
    "model": (ResNet9, AirNet),
    "model.norm": (BatchNormConfig,),
    "loss": (CrossEntropy,),
    "augmentations": (Crop, Flip, AlternatingFlip, Cutout),
    "sampling": (IndependentSampling, GroupedSampling),
    "tta": (FlipTTA, SixViewTTA, NoTTA),
}
_KNOWN_WITH = {
    ResNet9: {
        "model.activation": (Relu, Celu),
        "optim": (Nesterov,),
        "optim.schedule": (WarmupDecay,),
        "average": (Ema, type(None)),
    },
    AirNet: {
        "model.activation": (Gelu,),
        "optim": (AirbenchSGD, Muon),
        "optim.schedule": (Triangle,),
        "average": (Lookahead, Ema, type(None)),
    },
}


def versions() -> dict[str, str]:
    """Of what a number may depend on besides `provenance.versions`."""
    return {"torch": torch.__version__}


def check(recipe: Recipe) -> None:
    """Whether the twin knows every part of a recipe.

    Raises:
      ValueError: it does not; the message names the part.
    """
    # The model comes before its parts, which another model need not have.
    for name, known in (*_KNOWN.items(), *_KNOWN_WITH.get(type(recipe.model), {}).items()):
        part = operator.attrgetter(name)(recipe)
        for item in part if name == "augmentations" else (part,):
            if type(item) not in known:  # a subclass may do anything
                names = ", ".join("None" if kind is type(None) else kind.__name__ for kind in known)
                raise ValueError(
                    f"recipe {recipe.name!r} has {name} {item!r}; the PyTorch twin knows {names}: train it with JAX, "
                    "or write the part into fastcifar_jax/torch_baseline"
                )
    unused = {"model.norm.eval_first_group": False}
    if isinstance(recipe.model, ResNet9):
        unused |= {"model.extra_layers": (), "model.dirac": False}
    for name, unset in unused.items():
        if (value := operator.attrgetter(name)(recipe)) != unset:
            raise ValueError(f"the PyTorch twin has no {name} {value}; set it to {unset}, or train with JAX")
    if recipe.batch_size % recipe.model.norm.num_groups:
        raise ValueError(
            f"a batch of {recipe.batch_size} images is not {recipe.model.norm.num_groups} equal ghost groups; change "
            "batch_size"
        )


def make_train_step(
    recipe: Recipe, num_classes: int, steps_per_epoch: int, *, bfloat16: bool, compiled: bool
) -> Callable[[Tensor, Tensor, Tensor], StepInfo]:
    """One step of a recipe on the CPU as `bench` times it: augmentation and `make_step`, without whitening filters.

    Args:
      recipe: what to time; its compute dtype is left aside.
      num_classes: size of the logits.
      steps_per_epoch: of the schedule and the average.
      bfloat16: autocast over float32 master weights.
      compiled: whether the network goes through `torch.compile`.

    Returns:
      `step(images, labels, ids) -> sums over the batch`. The images are padded by the padding of the first
      augmentation that has one; the first call draws the plan that all calls use.

    Raises:
      ValueError: a part of the recipe that the twin does not know.
    """
    check(recipe)
    network, average, update = _make(recipe, num_classes, 0, torch.device("cpu"), steps_per_epoch)
    take = make_step(recipe, network, average, steps_per_epoch, bfloat16=bfloat16, compiled=compiled, update=update)
    pad = next((augmentation.padding for augmentation in recipe.augmentations if hasattr(augmentation, "padding")), 0)
    plan = None

    def step(images, labels, ids):
        nonlocal plan
        images = images[:, pad : images.shape[1] - pad, pad : images.shape[2] - pad]
        plan = plan or draw_plan(recipe, *images.shape[:3], torch.Generator().manual_seed(0))
        return take(make_batch(recipe, images, plan, ids), labels[ids])

    return step


def _cores():
    """How many the process may use; unlike `provenance.device` this does not start JAX's device."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _make(recipe, num_classes, seed, device, steps_per_epoch):
    """The network, its average or None, and the update of its weights or None for `nesterov`."""
    of_airnet = isinstance(recipe.model, AirNet)
    network = make_network(recipe.model, num_classes, seed, device, AirNetwork if of_airnet else Network)
    average = copy.deepcopy(network) if recipe.average else None
    return network, average, make_update(recipe, network, average, steps_per_epoch) if of_airnet else None


class _Run(NamedTuple):
    """A run before its first step."""

    recipe: Recipe
    data: Dataset  # of tensors on the device
    step: Step
    network: nn.Module
    evaluated: nn.Module  # the average, if the recipe has one
    first_flips: tuple[Tensor | None, ...]


def _start(
    recipe: Recipe, num_classes: int, dataset: Dataset, seed: int, device: torch.device, generator: torch.Generator
) -> _Run:
    data = Dataset(*(_tensor(array).to(device) for array in dataset))
    data = data._replace(train_labels=data.train_labels.long(), test_labels=data.test_labels.long())
    steps_per_epoch = len(data.train_labels) // recipe.batch_size
    network, average, update = _make(recipe, num_classes, seed, device, steps_per_epoch)
    of_airnet = isinstance(recipe.model, AirNet)
    if of_airnet or recipe.model.whiten:
        images = normalize(recipe, data.train_images[: recipe.init_images])
        filters = whitening_filters(images, recipe.model.whiten_eps, 2 if of_airnet else 3)
        filters = torch.cat([filters, -filters]) if of_airnet else filters
        for each in filter(None, (network, average)):
            each.whiten.weight.copy_(filters)
    bfloat16 = recipe.compute_dtype != "float32"
    step = make_step(recipe, network, average, steps_per_epoch, bfloat16=bfloat16, update=update)
    flips = draw_first_flips(recipe, len(data.train_labels), generator)
    return _Run(recipe, data, step, network, average or network, flips)


def _tensor(array):
    return torch.from_numpy(np.require(array, requirements=("C", "W")))  # PyTorch warns of what it cannot write to


def _train_epoch(
    run: _Run,
    generator: torch.Generator,
    epoch: int,
    num_steps: int,
    on_step: Callable[[int, StepInfo], None] | None,
) -> StepInfo:
    """Plans an epoch and takes `num_steps` steps; returns the sums over its images, as Python numbers."""
    images, labels, batch_size = run.data.train_images, run.data.train_labels, run.recipe.batch_size
    plan = draw_plan(run.recipe, *images.shape[:3], generator, epoch, run.first_flips)
    plan = Plan(plan.order.to(images.device), tuple(option.to(images.device) for option in plan.options))
    run.network.train()
    totals = StepInfo(torch.tensor(0.0, device=images.device), torch.tensor(0, device=images.device))
    for i in range(num_steps):
        ids = plan.order[i * batch_size : (i + 1) * batch_size]
        info = run.step(make_batch(run.recipe, images, plan, ids), labels[ids])
        totals = StepInfo(totals.loss + info.loss, totals.correct + info.correct)
        if on_step is not None:
            on_step(i + 1, totals)
    return StepInfo(*(total.item() for total in totals))


def make_train(recipe: Recipe, num_classes: int, device: str | torch.device | None = None) -> Callable[..., RunResult]:
    """The run of a recipe as a function of a seed and a data set, with the results of `fastcifar_jax.train.make_train`.

    Same seed, recipe, data and machine: bitwise the same numbers on a CPU; on a GPU some of PyTorch's kernels add in
    any order. Another seed draws other weights and plans; the numbers are never JAX's for the same seed.

    The compute dtype "float32" is float32 throughout. "mixed" and "bfloat16" are both PyTorch's autocast to bfloat16
    over float32 master weights, which keeps bfloat16 between the layers, and logits, losses and statistics in float32.

    Training seconds count drawing the plan and all steps, not evaluation; setup seconds count the data's way to the
    device, initialisation and whitening; compile seconds are those of a step and an evaluation on a network that is
    thrown away, which a first call takes before its clock starts.

    Args:
      recipe: what to run.
      num_classes: size of the logits.
      device: None takes CUDA if PyTorch has it, where nothing of this was ever run, and the CPU otherwise. A CPU run
        uses as many threads as the process has cores.

    Returns:
      `train(seed, dataset, on_epoch=None, on_step=None, on_compiled=None) -> RunResult` for a `Dataset` of NumPy
      arrays. `on_epoch` is called with each finished `EpochInfo`; `on_step(epoch, step, totals)` after each step, with
      tensors; `on_compiled(seconds)` before the first. The result's state is the state dict of the network that is
      evaluated. `train` raises `Diverged` at the end of an epoch whose loss is not finite, and ValueError for a recipe
      that does not fit the data.

    Raises:
      ValueError: a part or a compute dtype that the twin does not know, or ghost groups that do not divide the batch.
    """
    recipe = resolve_dtype(recipe)
    check(recipe)
    if recipe.compute_dtype not in ("float32", "mixed", "bfloat16"):
        raise ValueError(
            f"the PyTorch twin has no compute_dtype {recipe.compute_dtype!r}; use float32, mixed or bfloat16"
        )
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    warm = set()

    def warm_up(dataset):
        train, test = recipe.batch_size, TEST_CHUNK
        few = [array[:n] for array, n in zip(dataset, (train, train, test, test), strict=True)]
        generator = torch.Generator().manual_seed(0)
        run = _start(recipe, num_classes, Dataset(*few), 0, device, generator)
        _train_epoch(run, generator, 1, 1, None)
        evaluate(recipe, run.evaluated, run.data.test_images, run.data.test_labels)

    def train(
        seed: int,
        dataset: Dataset,
        on_epoch: Callable[[EpochInfo], None] | None = None,
        on_step: Callable[[int, int, StepInfo], None] | None = None,
        on_compiled: Callable[[float], None] | None = None,
    ) -> RunResult:
        num_train, num_test = len(dataset.train_labels), len(dataset.test_labels)
        steps_per_epoch = num_train // recipe.batch_size
        if not steps_per_epoch:
            raise ValueError(
                f"batch_size {recipe.batch_size} is larger than the {num_train} training images; set it lower"
            )
        shapes = tuple((array.shape, str(array.dtype)) for array in dataset)
        compile_seconds = 0.0
        if shapes not in warm:
            begin = time.perf_counter()
            warm_up(dataset)
            compile_seconds = time.perf_counter() - begin
            warm.add(shapes)
        if on_compiled is not None:
            on_compiled(compile_seconds)

        seed_weights, seed_plans = map(int, np.random.SeedSequence(seed).generate_state(2))
        generator = torch.Generator().manual_seed(seed_plans)
        begin = time.perf_counter()
        run = _start(recipe, num_classes, dataset, seed_weights, device, generator)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        setup_seconds = time.perf_counter() - begin

        epochs: list[EpochInfo] = []
        for epoch, num_steps in enumerate(steps_of_epochs(recipe, steps_per_epoch), start=1):
            begin = time.perf_counter()
            step_seen = None if on_step is None else functools.partial(on_step, epoch)
            # Python numbers, so the device has finished.
            totals = _train_epoch(run, generator, epoch, num_steps, step_seen)
            seconds = time.perf_counter() - begin
            sums = evaluate(recipe, run.evaluated, run.data.test_images, run.data.test_labels)
            means = [*(x / (num_steps * recipe.batch_size) for x in totals), *(x / num_test for x in sums)]
            epochs.append(EpochInfo(epoch, seconds, *means))
            if not (math.isfinite(epochs[-1].train_loss) and math.isfinite(epochs[-1].test_loss)):
                raise Diverged(recipe.name, tuple(epochs))
            if on_epoch is not None:
                on_epoch(epochs[-1])
        num_images = count_steps(recipe.num_epochs, steps_per_epoch) * recipe.batch_size
        rate = num_images / sum(info.train_seconds for info in epochs)
        return RunResult(run.evaluated.state_dict(), tuple(epochs), setup_seconds, compile_seconds, rate)

    @functools.wraps(train)
    def train_on_all_cores(*args, **kwargs):
        threads = torch.get_num_threads()
        torch.set_num_threads(_cores())
        try:
            return train(*args, **kwargs)
        finally:
            torch.set_num_threads(threads)

    return train_on_all_cores
