"""airbench94 in PyTorch, channels first, with PyTorch's own SGD; written from airbench.md, not from the package."""

import copy
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.reference.problem import NUM_CLASSES, Case, Trajectory, batches, held_out
from tests.reference.torch_resnet9 import per_example_loss, to_flat

MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)


class Unit(nn.Module):
    """Section 2: convolution, perhaps a floor pool, batch norm whose scale stays 1."""

    def __init__(self, inputs: int, outputs: int, pool: bool):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding="same", bias=False)
        self.norm = nn.BatchNorm2d(outputs, eps=1e-12, momentum=0.4)
        self.norm.weight.requires_grad_(False)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.norm(F.max_pool2d(x, 2) if self.pool else x)


class TorchAirNet(nn.Module):
    """Section 2; with three convolutions a group, the wider network of section 9."""

    def __init__(self, width: int, scale: float, convs: int = 2):
        super().__init__()
        self.whiten = nn.Conv2d(3, 24, 2)
        self.whiten.weight.requires_grad_(False)
        widths = (24, width, 4 * width, 4 * width)
        self.convs, self.scale = convs, scale
        for group in (1, 2, 3):
            for i in range(1, convs + 1):
                inputs = widths[group - 1] if i == 1 else widths[group]
                self.add_module(f"group{group}_{i}", Unit(inputs, widths[group], pool=i == 1))
        self.linear = nn.Linear(widths[-1], NUM_CLASSES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.whiten(x))
        for group in (1, 2, 3):
            unit = lambda i, group=group: getattr(self, f"group{group}_{i}")
            x = skip = F.gelu(unit(1)(x))
            x = F.gelu(unit(2)(x))
            if self.convs == 3:
                x = F.gelu(unit(3)(x) + skip)
        return self.linear(F.max_pool2d(x, x.shape[-1]).flatten(1)) * self.scale


def flat(arrays: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """The package's names and layouts; batch norms have one ghost group there."""
    return to_flat({name: x for name, x in arrays.items() if "num_batches" not in name}, 1)


def load_flat(net: TorchAirNet, arrays: dict[str, np.ndarray]) -> None:
    """Copies the package's weights into the network; the names must be the same on both sides."""
    state = {name: x for name, x in net.state_dict().items() if "num_batches" not in name}
    assert set(flat(state)) == set(arrays)
    with torch.no_grad():
        for name, tensor in state.items():
            [path] = flat({name: tensor})
            x = torch.tensor(np.array(arrays[path]))
            tensor.copy_(
                x.permute(3, 2, 0, 1)
                if x.ndim == 4
                else x.T
                if x.ndim == 2 and "linear" in name
                else x.reshape(tensor.shape)
            )


def normalized(pixels: np.ndarray, dtype: torch.dtype) -> Tensor:
    """[n, h, w, 3] uint8 -> [n, 3, h, w]."""
    mean, std = (torch.tensor(constant, dtype=dtype) for constant in (MEAN, STD))
    return ((torch.as_tensor(pixels).to(dtype) / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def newton_schulz(gradient: Tensor, steps: int = 3) -> Tensor:
    """Section 6, steps 3 and 4, in the gradient's dtype: [outputs, features] in, the same out."""
    x = gradient / (gradient.norm() + 1e-7)
    if len(x) > x.shape[1]:
        return newton_schulz(gradient.T, steps).T
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


class Muon(torch.optim.Optimizer):
    """Section 6, in the dtype of the weights."""

    def __init__(self, params, lr: float):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for w in group["params"]:
                buffer = self.state[w].setdefault("momentum_buffer", torch.zeros_like(w))
                buffer.mul_(0.6).add_(w.grad)
                nesterov = w.grad + 0.6 * buffer
                w.mul_(math.sqrt(len(w)) / w.norm())
                w.sub_(group["lr"] * newton_schulz(nesterov.flatten(1)).view_as(w))


def optimizers(net: TorchAirNet, muon: bool, batch_size: int) -> list[tuple[torch.optim.Optimizer, bool]]:
    """Each optimiser with whether it is the whitening bias's own, which ends after three epochs. Sections 5 and 6."""
    kind = lambda name: (
        "whiten" if "whiten" in name else "bias" if "bias" in name else "head" if "linear" in name else "conv"
    )
    groups: dict[str, list[Tensor]] = {"whiten": [], "bias": [], "head": [], "conv": []}
    for name, w in net.named_parameters():
        if w.requires_grad:
            groups[kind(name)].append(w)

    def sgd(params, lr, l2):
        return torch.optim.SGD(params, lr=lr, momentum=0.85, weight_decay=l2, nesterov=True)

    if muon:
        decay = 2e-6 * batch_size
        return [
            (sgd(groups["whiten"], 0.053, decay / 0.053), True),
            (sgd(groups["bias"], 0.053, decay / 0.053), False),
            (sgd(groups["head"], 0.67, decay / 0.67), False),
            (Muon(groups["conv"], 0.24), False),
        ]
    kilosteps = 1024 * (1 + 1 / (1 - 0.85))
    lr, wd = 11.5 / kilosteps, 0.0153 * batch_size / kilosteps
    return [
        (sgd(groups["whiten"], lr, wd / lr), True),
        (sgd(groups["bias"], 64 * lr, wd / (64 * lr)), False),
        (sgd(groups["head"] + groups["conv"], lr, wd / lr), False),
    ]


def factor(step: int, num_steps: int, whiten_steps: int, muon: bool, of_whiten: bool) -> float:
    """What the peak rate is multiplied by at 0-based `step`."""
    if muon:
        return 1 - step / (whiten_steps if of_whiten else num_steps)
    warm_up = int(0.23 * num_steps)
    return float(np.interp(step, (0, warm_up, num_steps), (0.2, 1.0, 0.07)))


def train_twin(
    case: Case, weights: dict[str, np.ndarray], *, muon: bool, convs: int = 2, dtype=torch.float64
) -> Trajectory:
    """Trains from `weights` on the case's batches, without augmentation, and predicts the held-out images."""
    net = TorchAirNet(case.width, 1 / 256 if muon else 1 / 9, convs).to(dtype)
    load_flat(net, weights)
    net.train()
    rated = [
        (optimizer, of_whiten, [g["lr"] for g in optimizer.param_groups])
        for optimizer, of_whiten in optimizers(net, muon, case.batch_size)
    ]
    slow = {name: x.clone() for name, x in net.state_dict().items() if x.is_floating_point()}
    whiten_steps, losses, correct = 3 * case.steps_per_epoch, [], []
    for step, (pixels, labels) in enumerate(batches(case)):
        y = torch.as_tensor(labels)
        logits = net(normalized(pixels, dtype))
        loss = per_example_loss(logits, y, 0.2).sum()
        losses.append(loss.item())
        correct.append(int((logits.argmax(1) == y).sum()))
        net.zero_grad()
        loss.backward()
        for optimizer, of_whiten, rates in rated:
            if of_whiten and step >= whiten_steps:
                continue
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor(step, case.num_steps, whiten_steps, muon, of_whiten)
            optimizer.step()
        if not muon and (step + 1) % 5 == 0:
            decay = 0.95**5 * ((step + 1) / case.num_steps) ** 3
            with torch.no_grad():
                for name, fast in net.state_dict().items():
                    if fast.is_floating_point():
                        slow[name] = decay * slow[name] + (1 - decay) * fast
                        fast.copy_(slow[name])

    trained = {name for name, w in net.named_parameters() if w.requires_grad}
    velocity = {}
    for name, w in net.named_parameters():
        for optimizer, _, _ in rated:
            if w in optimizer.state:
                velocity[name] = optimizer.state[w]["momentum_buffer"]
    average = {} if muon else {name: x for name, x in slow.items() if name in trained or "running" in name}
    evaluated = copy.deepcopy(net).eval()
    if not muon:
        evaluated.load_state_dict(slow, strict=False)
    with torch.no_grad():
        x = normalized(held_out(case), dtype)
        padded, size = F.pad(x, (1, 1, 1, 1), mode="reflect"), x.shape[-1]
        views = [(x, 0.25), (padded[..., :size, :size], 0.125), (padded[..., 2:, 2:], 0.125)]
        logits = evaluated(x)
        tta_logits = sum(w * (evaluated(v) + evaluated(v.flip(3))) for v, w in views)
    return Trajectory(
        losses, correct, flat(net.state_dict()), flat(velocity), flat(average), logits.numpy(), tta_logits.numpy()
    )
