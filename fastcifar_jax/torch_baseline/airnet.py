"""The AirNet of a recipe in PyTorch, with its optimisers and Lookahead."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcifar_jax.averaging import Lookahead
from fastcifar_jax.models.airnet import AirNet
from fastcifar_jax.muon import NEWTON_SCHULZ, Muon
from fastcifar_jax.recipe import Recipe
from fastcifar_jax.schedules import count_steps
from fastcifar_jax.torch_baseline.network import GhostNorm


class Unit(nn.Module):
    """Convolution, pool if asked for, norm."""

    def __init__(self, model: AirNet, inputs: int, outputs: int, pool: bool):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn = GhostNorm(outputs, model.norm)
        self.pool = pool
        if model.dirac:
            with torch.no_grad():
                nn.init.dirac_(self.conv.weight[:inputs])

    def forward(self, x: Tensor) -> Tensor:
        """Normalised maps."""
        x = self.conv(x)
        return self.bn(F.max_pool2d(x, 2) if self.pool else x)


class AirNetwork(nn.Module):
    """The network of `fastcifar_jax.airnet`, channels first."""

    def __init__(self, model: AirNet, num_classes: int):
        super().__init__()
        self.scale = model.output_scale
        self.whiten = nn.Conv2d(3, 24, 2)
        self.whiten.weight.requires_grad_(False)
        self.trains_whiten = True  # False spares the gradient of the whitening layer's bias
        widths = (24, *model.channels)
        self.groups = nn.ModuleList(
            nn.ModuleList(Unit(model, a if i == 0 else b, b, pool=i == 0) for i in range(model.convs))
            for a, b in zip(widths, widths[1:], strict=False)
        )
        self.linear = nn.Linear(widths[-1], num_classes, bias=False)
        with torch.no_grad():
            if model.whiten_bias == "zeros":
                self.whiten.bias.zero_()
            if model.head == "unit_std":
                self.linear.weight.div_(self.linear.weight.std())

    def forward(self, x: Tensor) -> Tensor:
        """Logits of normalised images, `[batch, 3, height, width]` -> `[batch, classes]`."""
        bias = self.whiten.bias if self.trains_whiten else self.whiten.bias.detach()
        x = F.gelu(F.conv2d(x, self.whiten.weight, bias))
        for first, second, *third in self.groups:
            x = skip = F.gelu(first(x))
            x = F.gelu(second(x))
            for unit in third:
                x = F.gelu(unit(x) + skip)
        return self.linear(F.adaptive_max_pool2d(x, 1).flatten(1)) * self.scale

    def averaged_tensors(self) -> list[Tensor]:
        """What an average of the network covers: trained parameters and running statistics."""
        return [*(p for p in self.parameters() if p.requires_grad), *self.buffers()]


def make_update(
    recipe: Recipe, network: AirNetwork, average: AirNetwork | None, steps_per_epoch: int
) -> Callable[[int, int], None]:
    """The optimiser's part of a step, and Lookahead's.

    Args:
      recipe: with `AirbenchSGD` or `Muon`.
      network: holds the gradients of the summed loss.
      average: the slow copy, where the recipe has one.
      steps_per_epoch: of the schedule.

    Returns:
      `update(count, batch_size)`, with the number of steps taken, this one among them.
    """
    num_steps = count_steps(recipe.num_epochs, steps_per_epoch)
    groups = (_muon if isinstance(recipe.optim, Muon) else _kilostep)(recipe, network, num_steps, steps_per_epoch)

    def update(count, batch_size):
        del batch_size
        for optimizer, factor in groups:
            if (multiple := factor(count - 1)) is not None:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak_lr"] * multiple
                optimizer.step()
            else:
                network.trains_whiten = False
        if isinstance(recipe.average, Lookahead) and count % recipe.average.every == 0:
            keep = recipe.average.decay**recipe.average.every * (count / num_steps) ** 3
            with torch.no_grad():
                slow, fast = average.averaged_tensors(), network.averaged_tensors()
                torch._foreach_lerp_(slow, fast, 1 - keep)
                torch._foreach_copy_(fast, slow)

    return update


def _sgd(params, lr, l2, momentum):
    group = {"params": params, "lr": lr, "peak_lr": lr, "weight_decay": l2}
    return torch.optim.SGD([group], lr=lr, momentum=momentum, nesterov=momentum > 0, foreach=True)


def _named(network):
    kinds = {"whiten": [], "bias": [], "head": [], "kernel": []}
    for name, p in network.named_parameters():
        if p.requires_grad:
            of_norm, of_head = name.endswith("bn.bias"), name.startswith("linear")
            kinds["whiten" if "whiten" in name else "bias" if of_norm else "head" if of_head else "kernel"].append(p)
    return kinds


def _until(end, factor):
    """`factor` before step `end`, None from it on."""
    return lambda step: factor(step) if end is None or step < end else None


def _schedule(schedule, num_steps):
    """As a function of Python numbers."""
    peak = int(schedule.peak * num_steps)

    def factor(step):
        if step < peak:
            return schedule.start + (1 - schedule.start) * step / peak
        return 1 + (schedule.end - 1) * (step - peak) / (num_steps - peak)

    return factor


def _kilostep(recipe, network, num_steps, steps_per_epoch):
    optim, kinds = recipe.optim, _named(network)
    lr = optim.lr / (1024 * (1 + 1 / (1 - optim.momentum)))
    l2 = optim.weight_decay * recipe.batch_size / optim.lr
    factor = _schedule(optim.schedule, num_steps)
    end = None if optim.whiten_bias_epochs is None else optim.whiten_bias_epochs * steps_per_epoch
    return [
        (_sgd(kinds["whiten"], lr, l2, optim.momentum), _until(end, factor)),
        (_sgd(kinds["bias"], lr * optim.bias_scale, l2 / optim.bias_scale, optim.momentum), factor),
        (_sgd(kinds["head"] + kinds["kernel"], lr, l2, optim.momentum), factor),
    ]


def _muon(recipe, network, num_steps, steps_per_epoch):
    optim, kinds = recipe.optim, _named(network)
    decay, factor = optim.weight_decay * recipe.batch_size, _schedule(optim.schedule, num_steps)
    end = optim.whiten_bias_epochs * steps_per_epoch
    sgd = lambda kind, lr: _sgd(kinds[kind], lr, decay / lr, optim.sgd_momentum)
    whiten = _until(end, _schedule(optim.schedule, end)) if end else lambda step: None
    return [
        (sgd("whiten", optim.bias_lr), whiten),
        (sgd("bias", optim.bias_lr), factor),
        (sgd("head", optim.head_lr), factor),
        (MuonKernels(kinds["kernel"], optim), factor),
    ]


class MuonKernels(torch.optim.Optimizer):
    """Muon for convolution kernels, OIHW; see `fastcifar_jax.muon.Muon`."""

    def __init__(self, params: list[Tensor], optim: Muon):
        super().__init__([{"params": params, "peak_lr": optim.lr}], {"lr": optim.lr})
        self.optim = optim

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step."""
        del closure
        dtype = None if self.optim.compute_dtype is None else getattr(torch, self.optim.compute_dtype)
        for group in self.param_groups:
            for p in group["params"]:
                velocity = self.state[p].setdefault("velocity", torch.zeros_like(p))
                velocity.mul_(self.optim.momentum).add_(p.grad)
                update = p.grad.add(velocity, alpha=self.optim.momentum).flatten(1)
                p.mul_(math.sqrt(len(p)) / p.norm())
                update = orthogonalize(update, self.optim.newton_schulz_steps, dtype)
                p.sub_(update.view(p.shape), alpha=group["lr"])


def orthogonalize(matrix: Tensor, steps: int, dtype: torch.dtype | None) -> Tensor:
    """See `fastcifar_jax.muon.orthogonalize`."""
    a, b, c = NEWTON_SCHULZ
    x = matrix.to(dtype) if dtype else matrix
    x = x / (x.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(steps):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return (x.T if tall else x).to(matrix.dtype)
