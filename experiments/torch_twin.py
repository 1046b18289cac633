"""The recipes of the ladder in PyTorch, at the best CPU settings we know: the step that `bench --against torch` times.

Needs the extra `compare`. Written from the same specification and driven by the same `Recipe`, with the choices that
make PyTorch fastest here: channels-last memory, ghost groups as contiguous slices of the batch, one gather for crop and
flip, multi-tensor updates. `tests/reference/torch_resnet9.py` is the exact twin; this one is the fast one.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from fastcifar_jax.augment import Crop, Cutout, Flip
from fastcifar_jax.model import Celu, Norm, ResNet9
from fastcifar_jax.recipe import Recipe


class GhostNorm(nn.Module):
    """Batch norm over contiguous slices of the batch, with one set of running statistics."""

    def __init__(self, channels: int, norm: Norm):
        super().__init__()
        self.norm = norm
        self.weight = nn.Parameter(torch.ones(channels), requires_grad=norm.train_scale)
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised maps; statistics of each slice in training, running ones in evaluation."""
        keep = 1 - self.norm.momentum
        if not self.training or self.norm.num_groups == 1:
            return F.batch_norm(x, self.mean, self.var, self.weight, self.bias, self.training, keep, self.norm.eps)
        # Each slice moves the statistics by a share, so that all of them together move it as one batch would.
        share = 1 - self.norm.momentum ** (1 / self.norm.num_groups)
        statistics = (self.mean, self.var, self.weight, self.bias, True, share, self.norm.eps)
        return torch.cat([F.batch_norm(part, *statistics) for part in x.chunk(self.norm.num_groups)])


class Block(nn.Module):
    """Convolution, norm and activation in the network's order, with a 2x2 max-pool if asked for."""

    def __init__(self, model: ResNet9, inputs: int, outputs: int, size: int = 3, pool: bool = False):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)
        self.bn = GhostNorm(outputs, model.norm)
        self.order = model.pool_order if pool else "conv_norm_act"
        self.activation = model.activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One block."""
        for layer in self.order.split("_"):
            if layer == "conv":
                x = self.conv(x)
            elif layer == "norm":
                x = self.bn(x)
            elif layer == "pool":
                x = F.max_pool2d(x, 2)
            elif isinstance(self.activation, Celu):
                x = F.celu(x, self.activation.alpha)
            else:
                x = F.relu(x)
        return x


class Network(nn.Module):
    """The ResNet-9 of a recipe, without extra layers."""

    def __init__(self, model: ResNet9, num_classes: int):
        super().__init__()
        prep, *widths = model.channels
        self.scale = model.output_scale
        self.whiten = nn.Conv2d(3, 27, 3, padding=1, bias=False) if model.whiten else nn.Identity()
        self.whiten.requires_grad_(False)
        self.prep = Block(model, 27 if model.whiten else 3, prep, size=1 if model.whiten else 3)
        self.layers = nn.ModuleList(
            Block(model, a, b, pool=True) for a, b in zip((prep, *widths), widths, strict=False)
        )
        self.residuals = nn.ModuleDict(
            {name: nn.Sequential(Block(model, c, c), Block(model, c, c)) for name, c in self._residual(model, widths)}
        )
        self.linear = nn.Linear(widths[-1], num_classes, bias=False)

    @staticmethod
    def _residual(model, widths):
        return [(f"layer{i}", c) for i, c in enumerate(widths, start=1) if f"layer{i}" in model.res_layers]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of normalised images, NCHW."""
        x = self.prep(self.whiten(x))
        for i, layer in enumerate(self.layers, start=1):
            x = layer(x)
            if f"layer{i}" in self.residuals:
                x = x + self.residuals[f"layer{i}"](x)
        return self.linear(F.adaptive_max_pool2d(x, 1).flatten(1)) * self.scale


def make_batch(recipe: Recipe, images: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Augmented and normalised images, NCHW in channels-last memory.

    Args:
      recipe: its crops, flips and cutouts are drawn per example.
      images: uint8, `[n, height, width, 3]`, reflect-padded by the crop's padding.
      ids: of the images of the batch.
    """
    batch, (height, width) = len(ids), images.shape[1:3]
    parts = {type(augmentation): augmentation for augmentation in recipe.augmentations}
    pad = parts[Crop].padding if Crop in parts else 0
    size = (height - 2 * pad, width - 2 * pad)
    rows = torch.arange(size[0]) + torch.randint(0, 2 * pad + 1, (batch, 1))
    columns = torch.arange(size[1]).expand(batch, -1)
    if Flip in parts:
        columns = torch.where(torch.rand(batch, 1) < 0.5, columns.flip(1), columns)
    columns = columns + torch.randint(0, 2 * pad + 1, (batch, 1))
    x = images[ids[:, None, None], rows[:, :, None], columns[:, None, :]].float()
    x = (x - torch.tensor(recipe.mean)) / torch.tensor(recipe.std)
    if Cutout in parts:
        side = parts[Cutout].size
        offsets = [torch.arange(length) - torch.randint(0, length - side + 1, (batch, 1)) for length in size]
        inside = [(0 <= offset) & (offset < side) for offset in offsets]
        x.masked_fill_((inside[0][:, :, None] & inside[1][:, None, :])[..., None], 0.0)
    return x.permute(0, 3, 1, 2)


def make_train_step(
    recipe: Recipe, num_classes: int, steps_per_epoch: int, *, bfloat16: bool, compiled: bool
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """One step of a recipe: augmentation, forward, backward, Nesterov update, average.

    Args:
      recipe: a rung of the ladder.
      num_classes: size of the logits.
      steps_per_epoch: of the schedule and the average.
      bfloat16: autocast over float32 master weights.
      compiled: whether the network goes through `torch.compile`.

    Returns:
      `step(images, labels, ids) -> summed loss`; images are padded, see `make_batch`.
    """
    network = Network(recipe.model, num_classes).to(memory_format=torch.channels_last)
    forward = torch.compile(network) if compiled else network
    names, params = zip(*((n, p) for n, p in network.named_parameters() if p.requires_grad), strict=True)
    scales = [recipe.optim.bias_scale if name.endswith("bias") else 1.0 for name in names]
    velocity = [torch.zeros_like(p) for p in params]
    live = [*params, *network.buffers()]
    average = [t.detach().clone() for t in live] if recipe.average else []
    knots, end = recipe.optim.schedule.knots(recipe.num_epochs), recipe.optim.schedule.end
    count = 0

    def rate(time):
        up, down = time / knots[1], 1 - (1 - end) * (time - knots[1]) / (knots[2] - knots[1])
        return recipe.optim.peak_lr * (up if time < knots[1] else max(down, end))

    def step(images, labels, ids):
        nonlocal count
        x = make_batch(recipe, images, ids)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            logits = forward(x)
        smoothing = recipe.loss.label_smoothing
        loss = F.cross_entropy(logits.float(), labels[ids], label_smoothing=smoothing, reduction="sum")
        network.zero_grad(set_to_none=True)
        loss.backward()
        count += 1
        lr, decay, momentum = rate(count / steps_per_epoch), recipe.optim.weight_decay, recipe.optim.momentum
        with torch.no_grad():
            change = torch._foreach_div([p.grad for p in params], len(ids))
            torch._foreach_add_(change, torch._foreach_mul(list(params), [decay / s for s in scales]))
            torch._foreach_mul_(change, [-lr * s for s in scales])
            torch._foreach_mul_(velocity, momentum)
            torch._foreach_add_(velocity, change)
            torch._foreach_add_(list(params), change)
            torch._foreach_add_(list(params), velocity, alpha=momentum)
            if average and (count - 1) % steps_per_epoch % recipe.average.every == 0:
                torch._foreach_lerp_(average, live, 1 - recipe.average.decay**recipe.average.every)
        return loss.detach()

    return step
