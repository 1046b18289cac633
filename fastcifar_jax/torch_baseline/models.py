"""The networks of recipes in PyTorch, channels first.

Modules have the names of the package's networks: `layer1.block.norm.bias` here is `layer1/block/norm/bias` there.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcifar_jax.models.activations import Celu, Gelu, Relu
from fastcifar_jax.models.airnet import AirNet
from fastcifar_jax.models.layers import BatchNormConfig
from fastcifar_jax.models.resnet9 import ResNet9

WHITENING_CHUNK = 250  # images at a time: the patches of 10,000 images would take 1 GB


class GhostBatchNorm(nn.Module):
    """Batch norm over ghost groups (section 1.4 of the specification).

    Group g is the g-th slice of the batch, which costs no copy. In the specification it is the images n with
    `n % num_groups == g`. Batches are pieces of a uniformly random order, so the distribution is the same.
    """

    def __init__(self, channels: int, config: BatchNormConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.ones(channels), requires_grad=config.train_scale)
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("mean", torch.zeros(config.num_groups, channels))
        self.register_buffer("var", torch.ones(config.num_groups, channels))

    def train(self, mode: bool = True) -> "GhostBatchNorm":
        """Sets the mode. With `eval_first_group`, leaving training mode merges the groups' statistics for good."""
        if self.config.eval_first_group and self.training and not mode:
            for statistics in (self.mean, self.var):
                statistics.copy_(statistics.mean(0).expand_as(statistics))
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised maps, `[batch, channels, height, width]`; in training the batch is a multiple of the groups."""
        config = self.config
        if not self.training:
            mean, var = (s[0] if config.eval_first_group else s.mean(0) for s in (self.mean, self.var))
            return F.batch_norm(x, mean, var, self.weight, self.bias, False, eps=config.eps)
        groups = [
            F.batch_norm(
                group, self.mean[g], self.var[g], self.weight, self.bias, True, 1 - config.momentum, config.eps
            )
            for g, group in enumerate(x.chunk(config.num_groups))
        ]
        return torch.cat(groups) if len(groups) > 1 else groups[0]


def activate(x: Tensor, activation: Relu | Celu | Gelu) -> Tensor:
    """The activation of a recipe."""
    if isinstance(activation, Relu):
        return F.relu(x)
    if isinstance(activation, Gelu):
        return F.gelu(x)
    if x.dtype == torch.float64:  # the gradient of F.celu is off by 1e-7 in float64
        return activation.alpha * F.elu(x / activation.alpha)
    return F.celu(x, activation.alpha)


class _Block(nn.Module):
    """Some of convolution, norm, activation and 2x2 max-pool, in the order of their names in `order`."""

    def __init__(self, model: ResNet9 | AirNet, order: str, inputs: int, outputs: int, size: int = 3):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)
        self.norm = GhostBatchNorm(outputs, model.norm)
        self.order, self.activation = order.split("_"), model.activation
        if model.dirac and size > 1:
            with torch.no_grad():
                nn.init.dirac_(self.conv.weight[:inputs])

    def forward(self, x: Tensor) -> Tensor:
        for name in self.order:
            if name == "conv":
                x = self.conv(x)
            elif name == "norm":
                x = self.norm(x)
            elif name == "pool":
                x = F.max_pool2d(x, 2)
            else:
                x = activate(x, self.activation)
        return x


class _Layer(nn.Module):
    """A pooling block, then a residual pair and an extra block where the network has them."""

    def __init__(self, model: ResNet9, name: str, inputs: int, outputs: int):
        super().__init__()
        block = lambda: _Block(model, "conv_norm_act", outputs, outputs)
        self.block = _Block(model, model.pool_order, inputs, outputs)
        self.res1, self.res2 = (block(), block()) if name in model.res_layers else (None, None)
        self.extra = block() if name in model.extra_layers else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        if self.res1 is not None:
            x = x + self.res2(self.res1(x))  # no activation after the sum
        return x if self.extra is None else self.extra(x)


class TorchResNet9(nn.Module):
    """The nine-layer residual network (section 1 of the specification)."""

    def __init__(self, model: ResNet9, num_classes: int):
        super().__init__()
        self.model = model
        prep, *widths = model.channels
        self.whiten = nn.Conv2d(3, 27, 3, padding=1, bias=False).requires_grad_(False) if model.whiten else None
        inputs, size = (27, 1) if model.whiten else (3, 3)
        self.prep = _Block(model, "conv_norm_act", inputs, prep, size)
        for i, (before, after) in enumerate(zip((prep, *widths), widths, strict=False), start=1):
            self.add_module(f"layer{i}", _Layer(model, f"layer{i}", before, after))
        self.linear = nn.Linear(widths[-1], num_classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of normalised images, `[batch, 3, height, width]` -> `[batch, classes]`."""
        x = self.prep(x if self.whiten is None else self.whiten(x))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.adaptive_max_pool2d(x, 1).flatten(1)) * self.model.output_scale


class TorchAirNet(nn.Module):
    """The network of airbench (airbench.md, sections 2 and 9)."""

    def __init__(self, model: AirNet, num_classes: int):
        super().__init__()
        self.model = model
        self.whiten = nn.Conv2d(3, 24, 2)
        self.whiten.weight.requires_grad_(False)
        widths = (24, *model.channels)
        for group in (1, 2, 3):
            self.add_module(f"group{group}_1", _Block(model, "conv_pool_norm", widths[group - 1], widths[group]))
            for i in range(2, model.convs + 1):
                self.add_module(f"group{group}_{i}", _Block(model, "conv_norm", widths[group], widths[group]))
        self.linear = nn.Linear(widths[-1], num_classes, bias=False)
        with torch.no_grad():
            if model.whiten_bias == "zeros":
                self.whiten.bias.zero_()
            if model.head == "unit_std":
                self.linear.weight.div_(self.linear.weight.std())

    def forward(self, x: Tensor) -> Tensor:
        """Logits of normalised images, `[batch, 3, height, width]` -> `[batch, classes]`."""
        act = lambda x: activate(x, self.model.activation)
        x = act(self.whiten(x))
        for group in (1, 2, 3):
            unit = lambda i, x, group=group: getattr(self, f"group{group}_{i}")(x)
            x = skip = act(unit(1, x))
            x = act(unit(2, x))
            if self.model.convs == 3:
                x = act(unit(3, x) + skip)
        return self.linear(F.adaptive_max_pool2d(x, 1).flatten(1)) * self.model.output_scale


def make_network(
    model: ResNet9 | AirNet, num_classes: int, seed: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """A network with PyTorch's initial weights, without its whitening filters.

    The weights depend on the seed alone, and PyTorch's global generators are left as they were.
    """
    kind = TorchAirNet if isinstance(model, AirNet) else TorchResNet9
    with torch.random.fork_rng(devices=[]):  # the layers draw from the global generator
        torch.default_generator.manual_seed(seed)
        network = kind(model, num_classes)
    return network.to(device, dtype, memory_format=torch.channels_last)


def set_whitening_filters(network: nn.Module, images: Tensor) -> None:
    """Sets the filters of the whitening layer, if the network has one, from normalised images."""
    if network.whiten is None:
        return
    filters = whitening_filters(images, network.model.whiten_eps, network.whiten.kernel_size[0])
    if isinstance(network, TorchAirNet):
        filters = torch.cat([filters, -filters])
    with torch.no_grad():
        network.whiten.weight.copy_(filters)


def patch_moments(images: Tensor, size: int) -> np.ndarray:
    """Second moments, not centred, of the patches of `[n, 3, height, width]`, features (channel, row, column)."""
    features = 3 * size * size
    moments, count = np.zeros((features, features)), 0
    for chunk in images.split(WHITENING_CHUNK):
        patches = chunk.unfold(2, size, 1).unfold(3, size, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, features)
        moments += (patches.T @ patches).cpu().numpy()
        count += len(patches)
    return moments / (count - 1)


def whitening_filters(images: Tensor, eps: float, size: int) -> Tensor:
    """Filters whose responses to the patches of `images` are uncorrelated (section 5 of the specification).

    `[3 * size * size, 3, size, size]`, eigenvalues in descending order; `eps` is added to these. The sign of a filter
    is the solver's choice.
    """
    eigenvalues, eigenvectors = np.linalg.eigh(patch_moments(images, size))  # ascending; eigenvectors are columns
    bank = eigenvectors / np.sqrt(np.maximum(eigenvalues, 0) + eps)
    return torch.tensor(bank.T[::-1].reshape(-1, 3, size, size).copy(), dtype=images.dtype, device=images.device)
