"""PyTorch's side of a comparison: weights under the package's names, and trajectories.

Import this after `pytest.importorskip("torch")`.
"""

import numpy as np
import torch

from fastcifar_jax.recipe import Recipe
from fastcifar_jax.torch_baseline.augment import normalize
from fastcifar_jax.torch_baseline.evaluate import predict_views, summed_loss
from fastcifar_jax.torch_baseline.models import whitening_filters
from fastcifar_jax.torch_baseline.train_step import Trainer, averaged_tensors
from tests.reference import problem
from tests.reference.problem import Case, Trajectory


def path_of(name: str) -> str:
    """ "layer1.block.norm.weight" -> "layer1/block/norm/scale", the package's name."""
    renamed = name.replace("norm.weight", "norm.scale").replace("linear.weight", "linear").replace("weight", "kernel")
    return renamed.replace(".", "/")


def to_flat(arrays: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """PyTorch's names and layouts -> the package's."""

    def convert(path, x):
        if x.ndim == 4:
            return x.transpose(2, 3, 1, 0)  # OIHW -> HWIO
        return x.T if path == "linear" else x

    return {path_of(name): convert(path_of(name), x.detach().numpy().copy()) for name, x in arrays.items()}


def load_flat(network: torch.nn.Module, flat: dict[str, np.ndarray]) -> None:
    """Copies the package's weights into a network; the names and shapes must be the same on both sides."""
    state = network.state_dict()
    assert {path: x.shape for path, x in to_flat(state).items()} == {path: x.shape for path, x in flat.items()}
    for name, tensor in state.items():
        x = torch.tensor(flat[path_of(name)])
        tensor.copy_(x.permute(3, 2, 0, 1) if x.ndim == 4 else x.T if name == "linear.weight" else x)


def make_trainer(recipe: Recipe, case: Case, weights: dict[str, np.ndarray] | None = None) -> Trainer:
    """A trainer that starts from `weights`; None for those that need no JAX."""
    trainer = Trainer(recipe, problem.NUM_CLASSES, case.steps_per_epoch)
    weights = weights or problem.initial_weights({k: x.shape for k, x in to_flat(trainer.network.state_dict()).items()})
    for network in filter(None, (trainer.network, trainer.average)):
        load_flat(network, weights)
    return trainer


def batches(recipe: Recipe, case: Case) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The batches of a case, in the order of their ghost groups: image n is in group n % groups in the package."""
    order = torch.arange(case.batch_size).reshape(-1, recipe.model.norm.num_groups).T.flatten()
    dtype = getattr(torch, recipe.compute_dtype)
    return [
        (normalize(recipe, torch.as_tensor(pixels), dtype)[order], torch.as_tensor(labels)[order])
        for pixels, labels in problem.batches(case)
    ]


def train_torch(recipe: Recipe, case: Case, weights: dict[str, np.ndarray] | None = None) -> Trajectory:
    """Trains from `weights` on the case's batches and predicts its held-out images."""
    trainer = make_trainer(recipe, case, weights)
    losses, correct = [], []
    for step, (images, labels) in enumerate(batches(recipe, case), start=1):
        info = trainer.step(images, labels)
        losses.append(info.loss.item())
        correct.append(info.correct.item())
        if step % case.steps_per_epoch == 0:  # evaluation
            trainer.eval_network.eval()
            trainer.network.train()
    names = {p: name for name, p in trainer.network.named_parameters()}
    states = {names[p]: state for one in trainer.optimizers for p, state in one.optimizer.state.items()}
    velocity = to_flat({name: state["momentum_buffer"] for name, state in states.items()})
    velocity.pop("whiten/bias", None)
    averaged = set(map(id, averaged_tensors(trainer.average))) if trainer.average else set()
    average = {name: x for name, x in trainer.eval_network.state_dict(keep_vars=True).items() if id(x) in averaged}
    with torch.no_grad():
        images = normalize(recipe, torch.as_tensor(problem.held_out(case)), trainer.dtype)
        logits = [x.numpy() for x in predict_views(recipe, trainer.eval_network.eval(), images)]
    weights = to_flat(trainer.network.state_dict())
    return Trajectory(losses, correct, weights, velocity, to_flat(average), *logits)


def losses_at(recipe: Recipe, case: Case, weights: list[dict[str, np.ndarray]]) -> list[float]:
    """The loss of each step's batch at that step's weights."""
    trainer, losses = make_trainer(recipe, case), []
    for before, (images, labels) in zip(weights, batches(recipe, case), strict=True):
        load_flat(trainer.network, before)
        losses.append(summed_loss(recipe, trainer.network(images), labels).item())
    return losses


def filters_and_moments(recipe: Recipe) -> tuple[np.ndarray, np.ndarray]:
    """[27, 27] whitening filters, and the second moments that they are of, computed in one piece."""
    images = normalize(recipe, torch.as_tensor(problem.whitening_images()), torch.float64)
    patches = images.unfold(2, 3, 1).unfold(3, 3, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 27)
    filters = whitening_filters(images, recipe.model.whiten_eps, 3).reshape(27, 27)
    return filters.numpy(), (patches.T @ patches / (len(patches) - 1)).numpy()
