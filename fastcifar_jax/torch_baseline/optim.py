"""The optimisers and averages of recipes in PyTorch, for gradients of a loss that is summed over the batch."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastcifar_jax import muon, optim
from fastcifar_jax.averaging import Ema
from fastcifar_jax.recipe import Recipe
from fastcifar_jax.schedules import Triangle, WarmupDecay, count_steps

Schedule = Callable[[int], float]  # steps taken before -> multiple of the peak rates


class ScheduledOptimizer(NamedTuple):
    """An optimiser whose rates follow a schedule."""

    optimizer: torch.optim.Optimizer  # each of its groups has a `peak_lr`
    schedule: Schedule
    num_steps: int | None = None  # steps after which its parameters are frozen; None: never


class Nesterov(torch.optim.Optimizer):
    """Nesterov SGD with the learning rate inside the velocity (section 3.2 of the specification).

    With `d = -lr * (g / batch_size + weight_decay * w)`: `v <- momentum * v + d`, `w <- w + d + momentum * v`.
    """

    def __init__(self, groups: list[dict], momentum: float, batch_size: int):
        super().__init__(groups, {"momentum": momentum, "batch_size": batch_size})

    @torch.no_grad()
    def step(self) -> None:
        """One step."""
        for group in self.param_groups:
            params, lr, momentum = group["params"], group["lr"], group["momentum"]
            velocity = [_velocity(self, p) for p in params]
            change = torch._foreach_mul([p.grad for p in params], -lr / group["batch_size"])
            torch._foreach_add_(change, params, alpha=-lr * group["weight_decay"])
            torch._foreach_mul_(velocity, momentum)
            torch._foreach_add_(velocity, change)
            torch._foreach_add_(params, change)
            torch._foreach_add_(params, velocity, alpha=momentum)


class Muon(torch.optim.Optimizer):
    """Orthogonalised updates of convolution kernels, OIHW, that keep their norms (airbench.md, section 6)."""

    def __init__(self, params: list[Tensor], config: muon.Muon):
        super().__init__([{"params": params, "peak_lr": config.lr}], {})
        self.config = config
        self.dtype = None if config.compute_dtype is None else getattr(torch, config.compute_dtype)

    @torch.no_grad()
    def step(self) -> None:
        """One step."""
        [group], config = self.param_groups, self.config
        for p in group["params"]:
            velocity = _velocity(self, p).mul_(config.momentum).add_(p.grad)
            update = p.grad.add(velocity, alpha=config.momentum).flatten(1)
            p.mul_(math.sqrt(len(p)) / p.norm())
            update = orthogonalize(update, config.newton_schulz_steps, self.dtype)
            p.sub_(update.view(p.shape), alpha=group["lr"])


def orthogonalize(matrix: Tensor, steps: int, dtype: torch.dtype | None) -> Tensor:
    """Newton-Schulz iteration with products in `dtype`, that of the matrix when None (airbench.md, section 6)."""
    x = matrix.to(dtype) if dtype else matrix
    x = x / (x.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(steps):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return (x.T if tall else x).to(matrix.dtype)


def _velocity(optimizer, p):
    if p not in optimizer.state:
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer.state[p]["momentum_buffer"]


def make_optimizers(recipe: Recipe, network: nn.Module, steps_per_epoch: int) -> list[ScheduledOptimizer]:
    """The optimisers that together train a network."""
    kinds: dict[str, list[Tensor]] = {"whiten": [], "bias": [], "linear": [], "other": []}
    for name, p in network.named_parameters():
        kind = name.split(".")[0] if name.startswith(("whiten", "linear")) else name.split(".")[-1]
        if p.requires_grad:
            kinds[kind if kind in kinds else "other"].append(p)
    make = {optim.Nesterov: _nesterov, optim.AirbenchSGD: _airbench_sgd, muon.Muon: _muon}[type(recipe.optim)]
    return [one for one in make(recipe, kinds, steps_per_epoch) if one.optimizer.param_groups[0]["params"]]


def take_step(optimizers: list[ScheduledOptimizer], step: int) -> None:
    """Updates the parameters from their gradients; `step` is the number of steps taken before."""
    for optimizer, schedule, num_steps in optimizers:
        if num_steps is not None and step >= num_steps:
            for group in optimizer.param_groups:  # spares their gradients from here on
                for p in group["params"]:
                    p.requires_grad_(False)
            continue
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * schedule(step)
        optimizer.step()


def _nesterov(recipe, kinds, steps_per_epoch):
    config = recipe.optim
    weights = {
        "params": kinds["other"] + kinds["linear"],
        "peak_lr": config.peak_lr,
        "weight_decay": config.weight_decay,
    }
    biases = {
        "params": kinds["whiten"] + kinds["bias"],
        "peak_lr": config.peak_lr * config.bias_scale,
        "weight_decay": config.weight_decay / config.bias_scale,
    }
    schedule = warmup_decay(config.schedule, recipe.num_epochs, steps_per_epoch)
    return [ScheduledOptimizer(Nesterov([weights, biases], config.momentum, recipe.batch_size), schedule)]


def _airbench_sgd(recipe, kinds, steps_per_epoch):
    config = recipe.optim
    lr = config.lr / (1024 * (1 + 1 / (1 - config.momentum)))
    decay = config.weight_decay * recipe.batch_size / config.lr
    sgd = lambda params, factor: _sgd(params, lr * factor, decay / factor, config.momentum)
    schedule = triangle(config.schedule, count_steps(recipe.num_epochs, steps_per_epoch))
    end = None if config.whiten_bias_epochs is None else config.whiten_bias_epochs * steps_per_epoch
    return [
        ScheduledOptimizer(sgd(kinds["whiten"], 1.0), schedule, end),
        ScheduledOptimizer(sgd(kinds["bias"], config.bias_scale), schedule),
        ScheduledOptimizer(sgd(kinds["linear"] + kinds["other"], 1.0), schedule),
    ]


def _muon(recipe, kinds, steps_per_epoch):
    config = recipe.optim
    decay = config.weight_decay * recipe.batch_size
    sgd = lambda kind, lr: _sgd(kinds[kind], lr, decay / lr, config.sgd_momentum)
    schedule = triangle(config.schedule, count_steps(recipe.num_epochs, steps_per_epoch))
    end = config.whiten_bias_epochs * steps_per_epoch
    return [
        ScheduledOptimizer(sgd("whiten", config.bias_lr), triangle(config.schedule, end), end),
        ScheduledOptimizer(sgd("bias", config.bias_lr), schedule),
        ScheduledOptimizer(sgd("linear", config.head_lr), schedule),
        ScheduledOptimizer(Muon(kinds["other"], config), schedule),
    ]


def _sgd(params, lr, weight_decay, momentum):
    group = {"params": params, "peak_lr": lr, "weight_decay": weight_decay}
    return torch.optim.SGD([group], lr=lr, momentum=momentum, nesterov=momentum > 0, foreach=True)


def warmup_decay(schedule: WarmupDecay, num_epochs: float, steps_per_epoch: int) -> Schedule:
    """Section 3.4 of the specification: the first step sees the rate of the time `1 / steps_per_epoch`."""
    knots = (0.0, schedule.warmup * num_epochs, num_epochs - schedule.flat_epochs)
    return lambda step: float(np.interp((step + 1) / steps_per_epoch, knots, (0.0, 1.0, schedule.end)))


def triangle(schedule: Triangle, num_steps: int) -> Schedule:
    """Airbench.md, section 5: the first step has the rate `start`, or the peak without a rise."""
    peak = int(schedule.peak * num_steps)
    first = 0 if peak else 1
    knots, values = (0, peak, num_steps)[first:], (schedule.start, 1.0, schedule.end)[first:]
    return lambda step: float(np.interp(step, knots, values))


def update_average(recipe: Recipe, slow: list[Tensor], fast: list[Tensor], count: int, steps_per_epoch: int) -> None:
    """Moves the average `slow` towards the network's tensors `fast` in every `every`-th step; Lookahead resets `fast`.

    `count` is the number of steps taken, including the current one.
    """
    average = recipe.average
    if isinstance(average, Ema):
        if (count - 1) % steps_per_epoch % average.every == 0:
            torch._foreach_lerp_(slow, fast, 1 - average.decay**average.every)
    elif count % average.every == 0:
        progress = count / count_steps(recipe.num_epochs, steps_per_epoch)
        torch._foreach_lerp_(slow, fast, 1 - average.decay**average.every * progress**3)
        torch._foreach_copy_(fast, slow)
