"""The fast AirNet in PyTorch against the exact one, and the parts of airbench's runs."""

import copy
from dataclasses import replace

import numpy as np
import pytest

from experiments.airbench import airbench94, airbench94_muon
from experiments.bag_of_tricks import final
from fastcifar_jax.augment import AlternatingFlip, Crop
from tests.models import test_airnet
from tests.reference import problem

torch = pytest.importorskip("torch", reason='needs PyTorch: pip install -e ".[compare]"')

from fastcifar_jax.torch_baseline.airnet import AirNetwork, make_update
from fastcifar_jax.torch_baseline.batches import draw_first_flips, draw_plan
from fastcifar_jax.torch_baseline.network import evaluate, make_network, make_step
from tests.helpers_torch import CPU, assert_same, generator, merged, path_of
from tests.reference import torch_airnet as exact_airnet
from tests.reference import torch_resnet9 as exact

pytestmark = pytest.mark.usefixtures("torch_on_one_thread")


def airnet_path(name: str) -> str:
    """ "groups.0.1.bn.weight" -> "group1_2/norm/scale", the package's name."""
    for group, i in np.ndindex(3, 3):
        name = name.replace(f"groups.{group}.{i}.", f"group{group + 1}_{i + 1}.")
    return path_of(name)


@pytest.mark.parametrize("name", test_airnet.RUNS)
def test_airnets_follow_the_exact_twin(name):
    recipe, muon, convs = test_airnet.RUNS[name]
    recipe, case = test_airnet.reduced(recipe, "float32"), problem.AIRBENCH
    exact_net = exact_airnet.TorchAirNet(case.width, 1.0, convs)
    shapes = {path: x.shape for path, x in exact_airnet.flat(exact_net.state_dict()).items()}
    weights = problem.initial_weights(shapes)
    theirs = exact_airnet.train_twin(case, weights, muon=muon, convs=convs)

    network = AirNetwork(recipe.model, problem.NUM_CLASSES).double()
    for key, x in network.state_dict().items():
        array = torch.tensor(merged(weights)[airnet_path(key)])
        x.copy_(array.permute(3, 2, 0, 1) if x.ndim == 4 else array.T if x.ndim == 2 else array)
    average = None if muon else copy.deepcopy(network)
    update = make_update(recipe, network, average, case.steps_per_epoch)
    step = make_step(recipe, network, average, case.steps_per_epoch, bfloat16=False, update=update)
    infos = [step(exact_airnet.normalized(x, torch.float64), torch.as_tensor(y)) for x, y in problem.batches(case)]
    np.testing.assert_allclose([float(info.loss) for info in infos], theirs.losses, rtol=1e-9)
    for net, expected in ((network, theirs.weights), (average, {**theirs.weights, **theirs.average})):
        if net is not None:
            found = {airnet_path(key): x.numpy() for key, x in net.state_dict().items()}
            found = {path: x.transpose(2, 3, 1, 0) if x.ndim == 4 else x.T for path, x in found.items()}
            assert_same(found, merged(expected), 1e-8, 1e-10)

    (average or network).eval()
    labels = torch.arange(25) % 10
    found = evaluate(recipe, (average or network).float(), torch.as_tensor(problem.held_out(case)), labels)
    for logits, loss in ((theirs.logits, found.test_loss), (theirs.tta_logits, found.tta_loss)):
        assert loss == pytest.approx(
            float(exact.per_example_loss(torch.as_tensor(logits), labels, 0.2).sum()), rel=1e-4
        )


def test_an_airnet_starts_as_the_package_says():
    network = make_network(airbench94_muon.model, 10, 0, CPU, AirNetwork)
    second = network.groups[1][0].conv.weight.detach()  # 64 -> 256
    np.testing.assert_array_equal(second[:64, :, 1, 1], np.eye(64))
    assert second[:64].abs().sum() == 64 and 0 < second[64:].abs().max() <= (9 * 64) ** -0.5
    assert float(network.linear.weight.detach().std()) == pytest.approx(1)
    assert 0.1 < network.whiten.bias.detach().abs().max() <= 12**-0.5
    assert not make_network(airbench94.model, 10, 0, CPU, AirNetwork).whiten.bias.any()


def test_alternating_flips_show_every_image_both_ways():
    recipe = replace(final, augmentations=(Crop(2), AlternatingFlip()))
    draws = generator()
    first = draw_first_flips(recipe, 1000, draws)
    flips = [draw_plan(recipe, 1000, 32, 32, draws, epoch, first).options[1].numpy() for epoch in (1, 2, 3)]
    assert 400 < flips[0].sum() < 600 and np.all(flips[0] != flips[1]) and np.all(flips[0] == flips[2])
