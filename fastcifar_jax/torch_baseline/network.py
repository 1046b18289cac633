"""The ResNet-9 of a recipe in PyTorch, and for any network: where it starts, one training step and its evaluation.

Tensors of images are channels first, in channels-last memory. Of the recipe every part is taken to be one that
`torch_twin.check` lets pass.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcifar_jax.averaging import Ema
from fastcifar_jax.evaluate import NoTTA, SixViewTTA
from fastcifar_jax.models.activations import Celu
from fastcifar_jax.models.layers import BatchNormConfig
from fastcifar_jax.models.resnet9 import ResNet9
from fastcifar_jax.recipe import Recipe
from fastcifar_jax.types import Evaluation, StepInfo

WHITENING_CHUNK = 250  # images at a time: all 10,000 would unfold into 1 GB of patches
TEST_CHUNK = 500  # images at a time

Step = Callable[[Tensor, Tensor], StepInfo]
Update = Callable[[int, int], None]  # (steps taken with this one, batch size), from the gradients of the summed loss


class GhostNorm(nn.Module):
    """Batch norm over contiguous slices of the batch, with one set of running statistics.

    The specification (section 1.4) interleaves the groups: image n belongs to group `n % num_groups`. Here group g is
    the g-th slice of the batch. Given a batch, the groups differ; over a run they cannot, because a batch is a piece of
    a uniformly random order of the images, so that either way every group is a random subset of the same size.

    The specification keeps running statistics for each group and evaluates with their mean over the groups. That mean
    is linear in the statistics, so it is kept instead of them: the same numbers up to rounding.
    """

    def __init__(self, channels: int, norm: BatchNormConfig):
        super().__init__()
        self.norm = norm
        self.weight = nn.Parameter(torch.ones(channels), requires_grad=norm.train_scale)
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))
        # Slice g replaces a share of what the slices before it left. With these shares every slice ends up with the
        # same weight, (1 - momentum) / num_groups, and the old statistics with `momentum`.
        weight, last = (1 - norm.momentum) / norm.num_groups, norm.num_groups - 1
        self.shares = [weight / (1 - (last - g) * weight) for g in range(norm.num_groups)]

    def forward(self, x: Tensor) -> Tensor:
        """Normalised maps; statistics of each slice in training, running ones in evaluation.

        Args:
          x: `[batch, channels, height, width]`; in training the batch is a multiple of the groups.
        """
        if not self.training:
            return F.batch_norm(x, self.mean, self.var, self.weight, self.bias, False, eps=self.norm.eps)
        parts = [
            F.batch_norm(part, self.mean, self.var, self.weight, self.bias, True, share, self.norm.eps)
            for part, share in zip(x.chunk(self.norm.num_groups), self.shares, strict=True)
        ]
        return torch.cat(parts) if len(parts) > 1 else parts[0]


class Block(nn.Module):
    """Convolution, norm and activation in the network's order, with a 2x2 max-pool if asked for."""

    def __init__(self, model: ResNet9, inputs: int, outputs: int, size: int = 3, pool: bool = False):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)
        self.bn = GhostNorm(outputs, model.norm)
        self.order = model.pool_order if pool else "conv_norm_act"
        self.activation = model.activation

    def forward(self, x: Tensor) -> Tensor:
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

    def forward(self, x: Tensor) -> Tensor:
        """Logits of normalised images, `[batch, 3, height, width]` -> `[batch, classes]`."""
        x = self.prep(self.whiten(x))
        for i, layer in enumerate(self.layers, start=1):
            x = layer(x)
            if f"layer{i}" in self.residuals:
                x = x + self.residuals[f"layer{i}"](x)
        return self.linear(F.adaptive_max_pool2d(x, 1).flatten(1)) * self.scale

    def averaged_tensors(self) -> list[Tensor]:
        """What an average of the network covers: trained parameters and running statistics."""
        return [*(p for p in self.parameters() if p.requires_grad), *self.buffers()]


def make_network(
    model: ResNet9, num_classes: int, seed: int, device: torch.device, kind: type[nn.Module] = Network
) -> nn.Module:
    """A network with PyTorch's initial weights, float32; the whitening filters are still to be set.

    Args:
      model: of the recipe.
      num_classes: size of the logits.
      seed: of the weights. PyTorch's global generators are left as they were.
      device: where to put it; the weights do not depend on it.
      kind: of the network, for another `model`.
    """
    with torch.random.fork_rng(devices=[]):  # the layers draw from the global generator
        torch.default_generator.manual_seed(seed)
        network = kind(model, num_classes)
    return network.to(device, memory_format=torch.channels_last)


def whitening_filters(images: Tensor, eps: float, size: int = 3) -> Tensor:
    """Filters whose responses to the patches of `images` are uncorrelated (section 5 of the specification).

    Args:
      images: normalised and not padded, `[n, 3, height, width]`.
      eps: added to the eigenvalues of the patches' second moments, which are not centred.
      size: side of the patches, in pixels.

    Returns:
      `[3 * size * size, 3, size, size]` in the images' dtype, eigenvalues in descending order. A filter's sign is the
      solver's choice.
    """
    features = 3 * size * size
    moments = np.zeros((features, features))
    for chunk in images.split(WHITENING_CHUNK):
        patches = chunk.unfold(2, size, 1).unfold(3, size, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, features)
        moments += (patches.T @ patches).cpu().numpy()
    num_patches = len(images) * (images.shape[2] - size + 1) * (images.shape[3] - size + 1)
    eigenvalues, eigenvectors = np.linalg.eigh(moments / (num_patches - 1))  # ascending; eigenvectors are columns
    bank = eigenvectors / np.sqrt(np.maximum(eigenvalues, 0) + eps)
    return torch.tensor(bank.T[::-1].reshape(features, 3, size, size).copy(), dtype=images.dtype, device=images.device)


def normalize(recipe: Recipe, pixels: Tensor) -> Tensor:
    """`(pixel - mean) / std`: `[n, height, width, 3]` uint8 -> `[n, 3, height, width]` float32 in NHWC memory."""
    mean, std = (torch.tensor(constant, device=pixels.device) for constant in (recipe.mean, recipe.std))
    return pixels.float().sub_(mean).div_(std).permute(0, 3, 1, 2)


def learning_rate(recipe: Recipe, time: float) -> float:
    """The weights' rate for a mean loss, `time` epochs after the start of the run."""
    schedule = recipe.optim.schedule
    return recipe.optim.peak_lr * float(np.interp(time, schedule.knots(recipe.num_epochs), (0.0, 1.0, schedule.end)))


def nesterov(recipe: Recipe, network: Network, steps_per_epoch: int) -> Update:
    """The optimiser of the bag of tricks; see `fastcifar_jax.optim.Nesterov`.

    Args:
      recipe: its optimiser and schedule are used.
      network: holds the gradients of the summed loss.
      steps_per_epoch: of the schedule.
    """
    trained = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    scales = [recipe.optim.bias_scale if name.endswith("bias") else 1.0 for name, _ in trained]
    params = [p for _, p in trained]
    velocity = [torch.zeros_like(p) for p in params]
    decay, momentum = recipe.optim.weight_decay, recipe.optim.momentum

    def update(count, batch_size):
        lr = learning_rate(recipe, count / steps_per_epoch)
        change = torch._foreach_div([p.grad for p in params], batch_size)
        torch._foreach_add_(change, torch._foreach_mul(params, [decay / s for s in scales]))
        torch._foreach_mul_(change, [-lr * s for s in scales])
        torch._foreach_mul_(velocity, momentum)
        torch._foreach_add_(velocity, change)
        torch._foreach_add_(params, change)
        torch._foreach_add_(params, velocity, alpha=momentum)

    return update


def make_step(
    recipe: Recipe,
    network: nn.Module,
    average: nn.Module | None,
    steps_per_epoch: int,
    *,
    bfloat16: bool,
    compiled: bool = False,
    update: Update | None = None,
) -> Step:
    """One step of a recipe: forward, backward, update, average.

    Args:
      recipe: its loss, optimiser, schedule and average are used.
      network: is trained in place.
      average: is updated in place; None for none.
      steps_per_epoch: of the schedule and the average.
      bfloat16: autocast over float32 master weights.
      compiled: whether the network goes through `torch.compile`.
      update: of the optimiser; `nesterov` when None.

    Returns:
      `step(images, labels) -> sums over the batch`, of the forward pass that was differentiated. It counts its calls.
    """
    predict = _predictor(torch.compile(network) if compiled else network, network.linear.weight, bfloat16=bfloat16)
    update, summed_loss, count = update or nesterov(recipe, network, steps_per_epoch), _summed_loss(recipe), 0

    def step(images, labels):
        nonlocal count
        logits = predict(images)
        loss = summed_loss(logits, labels)
        network.zero_grad(set_to_none=True)
        loss.backward()
        count += 1
        with torch.no_grad():
            update(count, len(labels))
            if isinstance(recipe.average, Ema) and (count - 1) % steps_per_epoch % recipe.average.every == 0:
                share = 1 - recipe.average.decay**recipe.average.every
                torch._foreach_lerp_(average.averaged_tensors(), network.averaged_tensors(), share)
        return StepInfo(loss.detach(), _num_correct(logits, labels))

    return step


def evaluate(recipe: Recipe, network: Network, images: Tensor, labels: Tensor) -> Evaluation:
    """Loss and correct answers over a test set, plain and with test-time augmentation, as Python numbers.

    Args:
      recipe: its loss, test-time augmentation and compute dtype are used; all dtypes but float32 mean autocast.
      network: is left in evaluation mode.
      images: uint8, `[n, height, width, 3]`.
      labels: one an image.
    """
    predict = _predictor(network.eval(), network.linear.weight, bfloat16=recipe.compute_dtype != "float32")
    loss, sums = _summed_loss(recipe), []
    with torch.no_grad():
        for pixels, y in zip(images.split(TEST_CHUNK), labels.split(TEST_CHUNK), strict=True):
            x = normalize(recipe, pixels)
            plain = views = predict(x)
            if not isinstance(recipe.tta, NoTTA):
                views = (plain + predict(x.flip(3))) / 2  # logits are averaged, not probabilities
            if isinstance(recipe.tta, SixViewTTA):
                shift = recipe.tta.shift
                padded, (height, width) = F.pad(x, [shift] * 4, mode="reflect"), x.shape[2:]
                shifted = (padded[:, :, :height, :width], padded[:, :, -height:, -width:])
                views = views / 2 + sum(predict(view) + predict(view.flip(3)) for view in shifted) / 8
            scores = [f(logits, y) for logits in (plain, views) for f in (loss, _num_correct)]
            sums.append(torch.stack([score.double() for score in scores]))
    return Evaluation(*torch.stack(sums).sum(0).tolist())


def _predictor(network, weight, *, bfloat16):
    """Logits in the dtype of the weights."""

    def predict(images):
        with torch.autocast(weight.device.type, torch.bfloat16, enabled=bfloat16):
            logits = network(images)
        return logits.to(weight.dtype)

    return predict


def _summed_loss(recipe):
    return lambda logits, labels: F.cross_entropy(
        logits, labels, label_smoothing=recipe.loss.label_smoothing, reduction="sum"
    )


def _num_correct(logits, labels):
    return (logits.argmax(1) == labels).sum()
