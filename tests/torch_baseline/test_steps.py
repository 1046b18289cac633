"""The fast PyTorch twin, one step after another, against the exact one."""

import copy

import numpy as np
import pytest

from tests.reference import problem
from tests.reference.test_twin import BY_NAME, reduced

torch = pytest.importorskip("torch", reason='needs PyTorch: pip install -e ".[compare]"')

from fastcifar_jax.torch_baseline.network import Network, evaluate, make_network, make_step
from tests.helpers_torch import CPU, assert_same, merged, path_of
from tests.reference import torch_resnet9 as exact

pytestmark = pytest.mark.usefixtures("torch_on_one_thread")


def to_flat(network: Network) -> dict[str, np.ndarray]:
    """In the package's names and layouts, one set of running statistics."""
    flat = {path_of(name): x.detach().numpy().copy() for name, x in network.state_dict().items()}
    return {path: x.transpose(2, 3, 1, 0) if x.ndim == 4 else x.T for path, x in flat.items()}


def load_flat(network: Network, flat: dict[str, np.ndarray]) -> None:
    for name, x in network.state_dict().items():
        array = torch.tensor(merged(flat)[path_of(name)])
        x.copy_(array.permute(3, 2, 0, 1) if x.ndim == 4 else array.T if x.ndim == 2 else array)


def follow(name: str, case: problem.Case, dtype: torch.dtype):
    """Both twins from the same weights on the same batches.

    Returns:
      The recipe, the fast network and the one that is evaluated, its losses, and the exact twin's trajectory.
    """
    recipe, row = reduced(BY_NAME[name], case, "float32"), exact.ROWS[name]
    shapes = exact.to_flat(exact.TorchResNet9(row, case.width).state_dict(), row.groups)
    weights = problem.initial_weights({path: x.shape for path, x in shapes.items()})
    theirs = exact.train_twin(row, case, weights, dtype)

    network = make_network(recipe.model, problem.NUM_CLASSES, 0, CPU).to(dtype)
    load_flat(network, weights)
    average = copy.deepcopy(network) if recipe.average else None
    step = make_step(recipe, network, average, case.steps_per_epoch, bfloat16=False)
    # Image n is in group n % groups there and in slice n // (batch / groups) here.
    order = torch.arange(case.batch_size).reshape(-1, row.groups).T.flatten()
    infos = []
    for pixels, labels in problem.batches(case):
        infos.append(step(exact.normalized(pixels, dtype)[order], torch.as_tensor(labels)[order]))
    return recipe, network, average or network, infos, theirs


@pytest.mark.parametrize("name", BY_NAME)
def test_six_steps_of_every_recipe_follow_the_exact_twin(name):
    # In float64: to 1e-15 with ReLU, to 4e-7 with PyTorch's CELU, whose gradient is off by 1e-7 there.
    _, network, evaluated, infos, theirs = follow(name, problem.LADDER, torch.float64)
    np.testing.assert_allclose([float(info.loss) for info in infos], theirs.losses, rtol=1e-7)
    assert [int(info.correct) for info in infos] == theirs.correct
    assert_same(to_flat(network), merged(theirs.weights), 0, 4e-6)
    frozen = theirs.weights.keys() - theirs.average.keys()
    if theirs.average:
        assert_same(to_flat(evaluated), {**merged(theirs.weights), **merged(theirs.average)}, 0, 4e-6)
        assert frozen == {path for path in theirs.weights if path.endswith("scale") or path.startswith("whiten")}
    x = exact.normalized(problem.held_out(problem.LADDER), torch.float64)
    with torch.no_grad():
        evaluated.eval()
        np.testing.assert_allclose(evaluated(x), theirs.logits, 0, 4e-6)
        np.testing.assert_allclose((evaluated(x) + evaluated(x.flip(3))) / 2, theirs.tta_logits, 0, 4e-6)


@pytest.mark.parametrize("name", ["baseline", "ghost_norm", "frozen_scales", "whitening", "final"])
def test_a_float32_step_and_evaluation_follow_the_exact_twin(name):
    case = problem.LADDER._replace(num_steps=1)
    recipe, network, evaluated, infos, theirs = follow(name, case, torch.float32)
    np.testing.assert_allclose(float(infos[0].loss), theirs.losses[0], rtol=1e-5)
    assert_same(to_flat(network), merged(theirs.weights), 1e-3, 1e-4)
    assert_same(to_flat(evaluated), {**merged(theirs.weights), **merged(theirs.average)}, 1e-3, 1e-4)

    labels = torch.arange(25) % 10
    found = evaluate(recipe, evaluated, torch.as_tensor(problem.held_out(case)), labels)
    for logits, loss, correct in ((theirs.logits, *found[:2]), (theirs.tta_logits, *found[2:])):
        logits = torch.as_tensor(logits)
        expected = exact.per_example_loss(logits, labels, recipe.loss.label_smoothing).sum()
        assert loss == pytest.approx(float(expected), rel=1e-3)
        assert correct == (logits.argmax(1) == labels).sum()
