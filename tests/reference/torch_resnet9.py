"""The bag of tricks in PyTorch, channels first, with its rates and decays as the original states them.

Written from the specification (the sections are named below), not from the package: the loss is summed, the learning
rate divided by the batch size, the weight decay multiplied by it.
"""

import copy
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.reference.problem import NUM_CLASSES, Case, Trajectory, batches, held_out

MEAN = (125.31, 122.95, 113.87)
STD = (62.99, 62.09, 66.70)


class Row(NamedTuple):
    """One line of section 4's table; the rate is that of a mean loss."""

    epochs: int
    knots: tuple[float, float, float]  # in epochs
    rates: tuple[float, float, float]
    order: str  # of the blocks that pool
    smoothing: float = 0.0
    alpha: float | None = None  # of CELU; None is ReLU
    groups: int = 1
    frozen_scales: bool = False
    output_scale: float = 1 / 8
    beta_factor: float = 1.0  # times the rate, divides the decay
    whiten: bool = False
    ema: bool = False
    res_layers: tuple[str, ...] = ("layer1", "layer3")
    extra_layers: tuple[str, ...] = ()
    eval_first_group: bool = False  # the original's group-0 behaviour of section 1.4


_NAP, _NPA, _PNA = "conv norm act pool", "conv norm pool act", "conv pool norm act"
_OLD, _GHOST, _WHITE, _FLAT = (0, 0.4, 0), (0, 0.6, 0), (0, 1.0, 0), (0, 1.0, 0.1)
# fmt: off
ROWS = {
    "baseline":               Row(24, (0, 5, 24), _OLD, _NAP),
    "gpu_preprocessing":      Row(24, (0, 5, 24), _OLD, _NAP),
    "pool_before_activation": Row(24, (0, 5, 24), _OLD, _NPA),
    "pool_before_norm":       Row(24, (0, 5, 24), _OLD, _PNA),
    "max_pool":               Row(25, (0, 5, 25), _OLD, _PNA),
    "label_smoothing_25":     Row(25, (0, 5, 25), _OLD, _PNA, 0.2),
    "label_smoothing":        Row(23, (0, 4.6, 23), _OLD, _PNA, 0.2),
    "celu_23":                Row(23, (0, 4.6, 23), _OLD, _PNA, 0.2, 0.075),
    "celu":                   Row(20, (0, 4, 20), _OLD, _PNA, 0.2, 0.075),
    "ghost_norm_20":          Row(20, (0, 4, 20), _OLD, _PNA, 0.2, 0.075, 16),
    "ghost_norm":             Row(18, (0, 3.6, 18), _GHOST, _PNA, 0.2, 0.075, 16),
    "frozen_scales_16":       Row(18, (0, 3.6, 18), _GHOST, _PNA, 0.2, 0.3, 16, True, 1 / 16, 16),
    "frozen_scales_64":       Row(18, (0, 3.6, 18), _GHOST, _PNA, 0.2, 0.3, 16, True, 1 / 16, 64),
    "frozen_scales":          Row(17, (0, 3.4, 17), _GHOST, _PNA, 0.2, 0.3, 16, True, 1 / 16, 64),
    "whitening_17":           Row(17, (0, 3.4, 17), _GHOST, _PNA, 0.2, 0.3, 16, True, 1 / 16, 64, True),
    "whitening_15":           Row(15, (0, 3, 15), _GHOST, _PNA, 0.2, 0.3, 16, True, 1 / 16, 64, True),
    "whitening":              Row(14, (0, 2.8, 14), _WHITE, _PNA, 0.2, 0.3, 16, True, 1 / 16, 64, True),
    "ema_14":                 Row(14, (0, 2.8, 12), _FLAT, _PNA, 0.2, 0.3, 16, True, 1 / 16, 64, True, True),
    "ema":                    Row(13, (0, 2.6, 11), _FLAT, _PNA, 0.2, 0.3, 16, True, 1 / 16, 64, True, True),
    "tta_13":                 Row(13, (0, 2.6, 11), _FLAT, _PNA, 0.2, 0.3, 16, True, 1 / 16, 64, True, True),
    "final":                  Row(10, (0, 2, 8), _FLAT, _PNA, 0.2, 0.3, 16, True, 1 / 16, 64, True, True),
}
# fmt: on


def shortened(row: Row, epochs: int) -> Row:
    """The same story told in fewer epochs: the peak keeps its share of the run, a flat end its two epochs."""
    flat = row.epochs - row.knots[2]
    return row._replace(epochs=epochs, knots=(0, row.knots[1] / row.epochs * epochs, epochs - flat))


class GhostNorm(nn.Module):
    """Section 1.4: a batch [n, c, h, w] viewed as [n / groups, groups * c, h, w]; buffers are split-major."""

    def __init__(self, channels: int, groups: int, frozen_scale: bool):
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.ones(channels), requires_grad=not frozen_scale)
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(groups * channels))
        self.register_buffer("running_var", torch.ones(groups * channels))

    def train(self, mode: bool = True):
        if self.training and not mode:  # a module already in evaluation mode is not merged again
            for buffer in (self.running_mean, self.running_var):
                buffer.copy_(buffer.view(self.groups, -1).mean(0).repeat(self.groups))
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        if not self.training:
            mean, var = self.running_mean[:c], self.running_var[:c]
            return F.batch_norm(x, mean, var, self.weight, self.bias, False, 0.1, 1e-5)
        virtual = x.reshape(n // self.groups, self.groups * c, h, w)
        weight, bias = self.weight.repeat(self.groups), self.bias.repeat(self.groups)
        y = F.batch_norm(virtual, self.running_mean, self.running_var, weight, bias, True, 0.1, 1e-5)
        return y.view(n, c, h, w)


def celu(x: Tensor, alpha: float) -> Tensor:
    """Section 1.5. `F.celu` would not do: its float64 gradient is off by 1e-7 (PyTorch 2.13, CPU)."""
    return x.clamp(min=0) + alpha * torch.expm1(x.clamp(max=0) / alpha)


class Block(nn.Module):
    """Convolution, norm, activation and perhaps a 2x2 max-pool, in the order that the row gives (section 1.2)."""

    def __init__(self, row: Row, inputs: int, outputs: int, size: int = 3, pool: bool = False):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)
        self.norm = GhostNorm(outputs, row.groups, row.frozen_scales)
        self.order = [op for op in row.order.split() if pool or op != "pool"]
        self.alpha = row.alpha

    def forward(self, x: Tensor) -> Tensor:
        operations = {
            "conv": self.conv,
            "norm": self.norm,
            "act": F.relu if self.alpha is None else (lambda x: celu(x, self.alpha)),
            "pool": lambda x: F.max_pool2d(x, 2),
        }
        for op in self.order:
            x = operations[op](x)
        return x


class Layer(nn.Module):
    """A pooling block, perhaps a residual pair, perhaps an extra block."""

    def __init__(self, row: Row, name: str, inputs: int, outputs: int):
        super().__init__()
        self.block = Block(row, inputs, outputs, pool=True)
        self.residual = name in row.res_layers
        if self.residual:
            self.res1, self.res2 = Block(row, outputs, outputs), Block(row, outputs, outputs)
        self.extra = Block(row, outputs, outputs) if name in row.extra_layers else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        if self.residual:
            x = x + self.res2(self.res1(x))  # no activation after the sum
        return self.extra(x)


class TorchResNet9(nn.Module):
    """Section 1.1, with the options of 1.2 to 1.5 and 5."""

    def __init__(self, row: Row, width: int):
        super().__init__()
        self.output_scale = row.output_scale
        self.whiten = nn.Conv2d(3, 27, 3, padding=1, bias=False) if row.whiten else nn.Identity()
        self.whiten.requires_grad_(False)
        self.prep = Block(row, 27, width, size=1) if row.whiten else Block(row, 3, width)
        self.layer1 = Layer(row, "layer1", width, 2 * width)
        self.layer2 = Layer(row, "layer2", 2 * width, 4 * width)
        self.layer3 = Layer(row, "layer3", 4 * width, 8 * width)
        self.linear = nn.Linear(8 * width, NUM_CLASSES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.prep(self.whiten(x)))))
        x = F.max_pool2d(x, x.shape[-1])
        return self.linear(x.flatten(1)) * self.output_scale


def _path(name: str) -> str:
    """ "layer1.block.norm.weight" -> "layer1/block/norm/scale"."""
    renamed = name.replace("norm.weight", "norm.scale").replace("linear.weight", "linear").replace("weight", "kernel")
    return renamed.replace("running_", "").replace(".", "/")


def to_flat(arrays: dict[str, Tensor], groups: int) -> dict[str, np.ndarray]:
    """PyTorch's names and layouts -> the package's."""

    def convert(path, x):
        if x.ndim == 4:
            return x.transpose(2, 3, 1, 0)  # OIHW -> HWIO
        if path.endswith(("mean", "var")):
            return x.reshape(groups, -1)
        return x.T  # [classes, features] -> [features, classes]; vectors stay

    flat = {_path(name): tensor.detach().numpy().copy() for name, tensor in arrays.items()}
    return {path: convert(path, x) for path, x in flat.items()}


def load_flat(net: TorchResNet9, flat: dict[str, np.ndarray]) -> None:
    """Copies the package's weights into the network; the names must be the same on both sides."""
    state = net.state_dict()
    assert {_path(name) for name in state} == set(flat)
    for name, tensor in state.items():
        x = torch.as_tensor(np.array(flat[_path(name)]))
        x = x.permute(3, 2, 0, 1) if x.ndim == 4 else x.T if name == "linear.weight" else x.reshape(tensor.shape)
        assert x.shape == tensor.shape, name
        tensor.copy_(x)


def normalized(pixels: np.ndarray, dtype: torch.dtype) -> Tensor:
    """[n, h, w, 3] uint8 -> [n, 3, h, w]."""
    mean, std = (torch.tensor(constant, dtype=dtype) for constant in (MEAN, STD))
    return ((torch.as_tensor(pixels).to(dtype) - mean) / std).permute(0, 3, 1, 2).contiguous()


def per_example_loss(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Section 3.1."""
    log_p = F.log_softmax(logits, 1)
    xent = -log_p[torch.arange(len(labels)), labels]
    return (1 - smoothing) * xent + smoothing * -log_p.mean(1)


def whitening_moments(images: Tensor) -> Tensor:
    """Section 5, steps 2 and 3: [27, 27] second moments of the windows of [n, 3, h, w], channel-major, not centred."""
    x = images.unfold(2, 3, 1).unfold(3, 3, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 27)
    return x.T @ x / (len(x) - 1)


def whitening_bank(images: Tensor, eps: float = 1e-2) -> Tensor:
    """Section 5, steps 4 and 5: filters [27, 3, 3, 3], descending eigenvalues."""
    eigenvalues, eigenvectors = torch.linalg.eigh(whitening_moments(images))
    rows = eigenvectors.T.flip(0) / torch.sqrt(eigenvalues.flip(0) + eps)[:, None]
    return rows.reshape(27, 3, 3, 3)


def summed_loss(net: TorchResNet9, row: Row, pixels: np.ndarray, labels: np.ndarray) -> tuple[Tensor, int]:
    """The loss that is differentiated, and how many of the batch are right."""
    y = torch.as_tensor(labels)
    logits = net(normalized(pixels, next(net.parameters()).dtype))
    return per_example_loss(logits, y, row.smoothing).sum(), int((logits.argmax(1) == y).sum())


def losses_at(row: Row, case: Case, weights: list[dict[str, np.ndarray]], dtype: torch.dtype) -> list[float]:
    """The loss of each step's batch at that step's weights, given one set of weights a step."""
    net = TorchResNet9(row, case.width).to(dtype)
    losses = []
    for before, batch in zip(weights, batches(case), strict=True):
        load_flat(net, before)
        losses.append(summed_loss(net, row, *batch)[0].item())
    return losses


def train_twin(row: Row, case: Case, weights: dict[str, np.ndarray], dtype=torch.float64) -> Trajectory:
    """Trains from `weights` on the case's batches, without augmentation, and predicts the held-out images."""
    net = TorchResNet9(row, case.width).to(dtype)
    load_flat(net, weights)
    net.train()
    ema_net = copy.deepcopy(net) if row.ema else None
    trained = {name: w for name, w in net.named_parameters() if w.requires_grad}
    velocity = {name: torch.zeros_like(w) for name, w in trained.items()}
    losses, correct = [], []

    for index, (pixels, labels) in enumerate(batches(case)):
        loss, hits = summed_loss(net, row, pixels, labels)
        losses.append(loss.item())
        correct.append(hits)
        grads = torch.autograd.grad(loss, list(trained.values()))
        step = index + 1  # incremented before the schedule is looked up: the first update is step 1
        rate = float(np.interp(step / case.steps_per_epoch, row.knots, row.rates)) / len(labels)
        with torch.no_grad():
            for (name, w), g in zip(trained.items(), grads, strict=True):
                factor = row.beta_factor if "bias" in name else 1.0
                lr, decay = rate * factor, 5e-4 * len(labels) / factor
                d = -lr * (g + decay * w)
                velocity[name] = 0.9 * velocity[name] + d
                w += d + 0.9 * velocity[name]
            if row.ema and index % case.steps_per_epoch % 5 == 0:  # the counter is made anew each epoch
                rho = 0.99**5
                for averaged, current in zip(ema_net.state_dict().values(), net.state_dict().values(), strict=True):
                    averaged.mul_(rho).add_(current, alpha=1 - rho)
            if row.eval_first_group and step % case.steps_per_epoch == 0:  # validation
                (ema_net if row.ema else net).eval()
                net.train()

    state, average = net.state_dict(), ema_net.state_dict() if row.ema else {}
    average = {name: x for name, x in average.items() if name in trained or "running" in name}
    weights, average = to_flat(state, row.groups), to_flat(average, row.groups)
    with torch.no_grad():
        evaluated = copy.deepcopy(ema_net if row.ema else net).eval()
        x = normalized(held_out(case), dtype)
        logits, mirrored = evaluated(x), evaluated(x.flip(3))
    tta_logits = torch.stack([logits, mirrored]).mean(0)
    return Trajectory(
        losses, correct, weights, to_flat(velocity, row.groups), average, logits.numpy(), tta_logits.numpy()
    )
