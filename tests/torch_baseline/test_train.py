"""The fast PyTorch twin: against the exact one where numbers can be equal, against the package where laws can be."""

import copy
import dataclasses
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.airbench import airbench94, airbench94_muon
from experiments.bag_of_tricks import baseline, final, ghost_norm
from fastcifar_jax.augment import AlternatingFlip, Crop, Cutout, Flip, normalize
from fastcifar_jax.averaging import Ema, Progress
from fastcifar_jax.evaluate import NoTTA
from fastcifar_jax.models import whitening
from fastcifar_jax.train import Diverged
from fastcifar_jax.types import Dataset, EpochInfo
from tests.reference import problem
from tests.reference.test_twin import reduced
from tests.test_train import make_dataset, small

torch = pytest.importorskip("torch", reason='needs PyTorch: pip install -e ".[compare]"')

from fastcifar_jax.torch_baseline.network import Network, learning_rate, make_network, make_step, whitening_filters

from fastcifar_jax.torch_baseline import train as torch_twin
from fastcifar_jax.torch_baseline.train import make_train, make_train_step
from tests.helpers_torch import CPU
from tests.reference import torch_resnet9 as exact

ALL = (Crop(4), Flip(), Cutout(8))


@pytest.fixture(scope="module", autouse=True)
def one_thread(torch_on_one_thread):
    """In `make_train` too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_twin, "_cores", lambda: 1)
        yield


@pytest.fixture(scope="module")
def dataset():
    """Four classes, 112 training and 20 test images of 16x16, not to be written to, as JAX hands arrays out."""
    return Dataset(*(np.asarray(array) for array in make_dataset()))


def test_initial_weights_are_pytorchs_and_leave_its_generators_alone():
    before = torch.get_rng_state()
    network = make_network(final.model, 10, 3, CPU)
    assert torch.equal(torch.get_rng_state(), before)
    for name, weight in network.named_parameters():
        weight = weight.detach()
        if weight.ndim > 1:
            bound = weight[0].numel() ** -0.5
            assert 0.97 * bound < weight.abs().max() <= bound, name
            assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1), name
        else:
            assert (weight == (1 if name.endswith("weight") else 0)).all(), name
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert len(trained) == 17 and sum(p.numel() for p in network.parameters() if p.requires_grad) == 6_570_880
    again, other = make_network(final.model, 10, 3, CPU), make_network(final.model, 10, 4, CPU)
    assert torch.equal(again.linear.weight, network.linear.weight)
    assert not torch.equal(other.linear.weight, network.linear.weight)


# Whitening, schedule, average.


def test_whitening_filters_are_the_packages_up_to_sign():
    with jax.enable_x64(True):
        images = normalize(jnp.asarray(problem.whitening_images()), final.mean, final.std, jnp.float64)
        theirs = np.asarray(whitening.whitening_filters(images, eps=0.02)).transpose(3, 2, 0, 1)
    ours = whitening_filters(torch.tensor(np.asarray(images)).permute(0, 3, 1, 2), 0.02).numpy()
    signs = np.sign((ours * theirs).sum((1, 2, 3), keepdims=True))
    np.testing.assert_allclose(ours, signs * theirs, rtol=1e-7, atol=1e-9)


def test_filters_come_from_the_first_images_and_stay(dataset):
    recipe = small(final, init_images=40)
    found = make_train(recipe, 4)(0, dataset).state["whiten.weight"]
    images = torch.tensor(np.asarray(normalize(jnp.asarray(dataset.train_images[:40]), recipe.mean, recipe.std)))
    expected = whitening_filters(images.permute(0, 3, 1, 2), recipe.model.whiten_eps)
    np.testing.assert_allclose(found.abs(), expected.abs(), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("recipe", [baseline, ghost_norm, final], ids=lambda recipe: recipe.name)
def test_schedule_is_the_packages(recipe):
    schedule = recipe.optim.schedule(recipe.num_epochs)
    times = np.linspace(0, recipe.num_epochs + 1, 50)
    expected = [recipe.optim.peak_lr * float(schedule(time)) for time in times]
    np.testing.assert_allclose([learning_rate(recipe, time) for time in times], expected, rtol=1e-5, atol=1e-6)


def test_average_is_the_packages():
    """Ten steps, seven to an epoch: updates after steps 1, 6 and 8."""
    recipe = reduced(final, problem.EPOCHS, "float32")
    network = make_network(recipe.model, 10, 0, CPU)
    average = copy.deepcopy(network)
    step = make_step(recipe, network, average, 7, bfloat16=False)
    as_tree = lambda network: {str(i): jnp.array(x.detach()) for i, x in enumerate(network.averaged_tensors())}
    expected, update, moved = recipe.average.init(as_tree(network)), jax.jit(recipe.average.update), []
    for i in range(10):
        pixels, labels = problem.images_and_labels(64, 16, seed=i)
        before = as_tree(average)
        step(exact.normalized(pixels, torch.float32), torch.as_tensor(labels))
        expected, _ = update(expected, as_tree(network), Progress(jnp.int32(i + 1), jnp.int32(i % 7), 10))
        moved.append(not all(np.array_equal(a, b) for a, b in zip(before.values(), as_tree(average).values())))
        chex.assert_trees_all_close(as_tree(average), expected, rtol=1e-5, atol=1e-6)
    assert [i + 1 for i in range(10) if moved[i]] == [1, 6, 8]
    assert len(expected) == 9 + 8 + 16  # weights, biases, running statistics


# The whole run.


@pytest.fixture(scope="module")
def final_run(dataset):
    """`final` at the tests' size and its run with seed 0."""
    recipe = small(final)
    train = make_train(recipe, 4)
    return recipe, train, train(0, dataset)


def numbers(result):
    """Everything but the times."""
    return [row._replace(train_seconds=0.0) for row in result.epochs]


def test_same_seed_same_numbers_bit_for_bit(final_run, dataset):
    recipe, train, first = final_run
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    again, other = train(0, dataset), train(1, dataset)
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == threads
    assert numbers(again) == numbers(first) == numbers(make_train(recipe, 4)(0, dataset))
    assert all(torch.equal(again.state[name], first.state[name]) for name in first.state)
    assert numbers(other) != numbers(first)
    assert first.compile_seconds > again.compile_seconds == 0


def test_result_has_the_packages_form(final_run):
    _, _, result = final_run
    assert [row.epoch for row in result.epochs] == [1, 2, 3]
    for row in result.epochs:
        assert isinstance(row, EpochInfo)
        assert all(type(value) is float for value in row[1:])
        for accuracy, images in ((row.train_accuracy, 96), (row.test_accuracy, 20), (row.tta_accuracy, 20)):
            assert 0 <= accuracy <= 1 and accuracy * images == pytest.approx(round(accuracy * images))
    assert result.setup_seconds > 0
    assert result.images_per_second == pytest.approx(3 * 96 / sum(row.train_seconds for row in result.epochs))
    assert result.train_seconds > result.setup_seconds


def test_callbacks(final_run, dataset):
    _, train, first = final_run
    rows, steps, compiled = [], [], []
    train(0, dataset, rows.append, lambda *seen: steps.append(seen), compiled.append)
    assert [row._replace(train_seconds=0.0) for row in rows] == numbers(first)
    assert compiled == [0.0]
    assert [seen[:2] for seen in steps] == [(epoch, step) for epoch in (1, 2, 3) for step in (1, 2, 3)]
    for row, (_, _, totals) in zip(first.epochs, steps[2::3], strict=True):
        assert (float(totals.loss) / 96, int(totals.correct) / 96) == (row.train_loss, row.train_accuracy)


def test_the_average_is_evaluated_and_changes_no_training(final_run, dataset):
    recipe, _, averaged = final_run
    live = make_train(replace(recipe, average=None), 4)(0, dataset)
    last = make_train(replace(recipe, average=Ema(decay=0.0, every=1)), 4)(0, dataset)
    trained = lambda result: [row[:4] for row in numbers(result)]
    assert trained(averaged) == trained(live) == trained(last)
    assert numbers(last) == numbers(live) != numbers(averaged)
    for name, x in live.state.items():
        assert torch.equal(last.state[name], x)
        if name.endswith(("conv.weight", "mean", "var", "bias")):
            assert not torch.equal(averaged.state[name], x), name


def test_tta_is_the_mean_of_both_views(dataset):
    recipe = small(baseline, num_epochs=8, augmentations=())  # a mirrored quadrant is another class
    result = make_train(recipe, 4)(0, dataset)
    network = Network(recipe.model, 4)
    network.load_state_dict(result.state)
    x = torch.tensor(np.asarray(normalize(jnp.asarray(dataset.test_images), recipe.mean, recipe.std)))
    x, labels = x.permute(0, 3, 1, 2), torch.as_tensor(np.array(dataset.test_labels)).long()
    with torch.no_grad():
        network.eval()
        plain, mirrored = network(x), network(x.flip(3))
    row = result.epochs[-1]
    assert row.test_accuracy > 0.7 > row.tta_accuracy
    for logits, loss, accuracy in (
        (plain, row.test_loss, row.test_accuracy),
        ((plain + mirrored) / 2, row.tta_loss, row.tta_accuracy),
    ):
        expected = exact.per_example_loss(logits, labels, 0.0).mean()
        assert loss == pytest.approx(float(expected), rel=1e-3, abs=1e-6)
        assert accuracy == pytest.approx((logits.argmax(1) == labels).sum().item() / 20)


def test_without_tta_both_columns_are_the_same(dataset):
    row = make_train(small(final, tta=NoTTA()), 4)(0, dataset).epochs[-1]
    assert (row.test_loss, row.test_accuracy) == (row.tta_loss, row.tta_accuracy)


@pytest.mark.parametrize("recipe", [airbench94, airbench94_muon], ids=lambda recipe: recipe.name)
def test_the_loss_of_an_airnet_falls(recipe, dataset):
    """Its maximum over the whole map does not see which quadrant is bright, so the test accuracy says little."""
    recipe = small(recipe, num_epochs=15.5, augmentations=(Crop(2), AlternatingFlip()))
    result = make_train(recipe, 4)(0, dataset)
    assert len(result.epochs) == 16 and result.epochs[-1].train_loss < result.epochs[0].train_loss - 0.03


@pytest.mark.parametrize("compute_dtype", ["float32", "mixed"])
def test_it_learns(compute_dtype):
    """100 steps of the baseline tell the quadrants apart, as in the package; chance is 0.25."""
    learnable = Dataset(*(np.asarray(array) for array in make_dataset(160, 40)))
    recipe = small(baseline, num_epochs=20, augmentations=(), compute_dtype=compute_dtype)
    result = make_train(recipe, 4)(0, learnable)
    assert result.epochs[-1].test_accuracy > 0.9
    assert result.epochs[-1].train_loss < result.epochs[0].train_loss


def test_bfloat16_is_the_same_run_but_for_rounding(final_run, dataset):
    _, _, float32 = final_run
    mixed = make_train(small(final, compute_dtype="mixed"), 4)(0, dataset)
    assert numbers(mixed) == numbers(make_train(small(final, compute_dtype="bfloat16"), 4)(0, dataset))
    assert numbers(mixed) != numbers(float32)
    assert mixed.epochs[0].train_loss == pytest.approx(float32.epochs[0].train_loss, rel=0.02)
    assert all(x.dtype == torch.float32 for x in mixed.state.values())


def test_diverged(dataset):
    recipe, seen = small(final), []
    train = make_train(replace(recipe, optim=replace(recipe.optim, peak_lr=1e30)), 4)
    with pytest.raises(Diverged, match="final diverged in epoch 1.*lower optim.peak_lr") as error:
        train(0, dataset, seen.append)
    assert not seen and not np.isfinite(error.value.epochs[-1].train_loss)


def test_bench_step_takes_padded_images(dataset):
    padded = np.pad(dataset.train_images, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect")
    images, labels = torch.from_numpy(padded), torch.from_numpy(dataset.train_labels.copy()).long()
    step = make_train_step(small(final), 4, 3, bfloat16=True, compiled=False)
    first, *_, last = [step(images, labels, torch.arange(32)) for _ in range(9)]
    assert np.isfinite(float(first.loss)) and last.loss < first.loss


# What it refuses.


@dataclasses.dataclass(frozen=True)
class Invert:
    """An augmentation of a fork."""

    def options(self, height, width):
        return np.array([True, False])

    def __call__(self, image, option):
        return jnp.where(option, -image, image)


@dataclasses.dataclass(frozen=True)
class Focal:
    """A loss of a fork."""

    label_smoothing: float = 0.0

    def __call__(self, logits, labels):
        return jnp.zeros(len(labels))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"augmentations": (Crop(4), Invert())},
            r"augmentations Invert\(\); the PyTorch twin knows Crop, Flip, AlternatingFlip, Cutout",
        ),
        (
            {"loss": Focal()},
            r"loss Focal\(label_smoothing=0.0\); the PyTorch twin knows CrossEntropy: train it with JAX",
        ),
        ({"model": replace(final.model, extra_layers=("layer2",))}, r"no model.extra_layers \('layer2',\)"),
        (
            {"model": replace(final.model, norm=replace(final.model.norm, eval_first_group=True))},
            "no model.norm.eval_first_group True",
        ),
        ({"compute_dtype": "float16"}, "no compute_dtype 'float16'; use float32, mixed or bfloat16"),
        ({"compute_dtype": "float64"}, "no compute_dtype 'float64'"),
        ({"batch_size": 100}, "a batch of 100 images is not 16 equal ghost groups; change batch_size"),
    ],
)
def test_refuses_what_it_does_not_know(changes, message):
    with pytest.raises(ValueError, match=message):
        make_train(replace(final, **changes), 10)


def test_refuses_data_that_do_not_fit(dataset):
    with pytest.raises(ValueError, match="batch_size 512 is larger than the 112 training images; set it lower"):
        make_train(replace(final, compute_dtype="float32"), 4)(0, dataset)
    with pytest.raises(ValueError, match="Crop pads by 16 pixels"):
        make_train(small(final, augmentations=(Crop(16),)), 4)(0, dataset)


def test_versions():
    assert torch_twin.versions() == {"torch": torch.__version__}
