from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastcifar_jax.models.activations import Celu, Gelu, Relu
from fastcifar_jax.models.base import PRECISIONS
from fastcifar_jax.models.layers import BatchNormConfig, GhostBatchNorm, linen_model
from fastcifar_jax.models.resnet9 import ResNet9

BASELINE = ResNet9()
FINAL = ResNet9(
    pool_order="conv_pool_norm_act",
    activation=Celu(0.3),
    norm=BatchNormConfig(num_groups=16, train_scale=False),
    whiten=True,
    output_scale=1 / 16,
)
SMALL = {"channels": (4, 8, 8, 8)}


def images_of(num_images, size=32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(num_images, size, size, 3)), jnp.float32)


def shapes_of(network):
    model = network(10)
    return model, jax.eval_shape(model.init, jax.random.key(0), images_of(16))


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def total_macs(macs):
    return sum(jax.tree.leaves(macs))


@pytest.mark.parametrize(
    ("network", "counts"),
    [(BASELINE, (6_573_120, 25, 0, 379_261_952)), (FINAL, (6_570_880, 17, 2_969, 380_008_448))],
    ids=["baseline", "final"],
)
def test_counts(network, counts):
    """Trained numbers and arrays, fixed numbers, multiply-accumulates."""
    model, variables = shapes_of(network)
    params, macs = variables["params"], total_macs(model.macs(variables, images_of(1)))
    assert (count(params), len(jax.tree.leaves(params)), count(variables["constants"]), macs) == counts


def test_macs_per_layer_and_image_size():
    model, variables = shapes_of(BASELINE)
    macs = model.macs(variables, images_of(1))
    assert macs["prep"]["conv"]["macs"] == (1_769_472,)
    assert macs["layer1"]["block"]["conv"]["macs"] == (75_497_472,)
    assert macs["layer3"]["res2"]["conv"]["macs"] == (37_748_736,)
    assert total_macs(model.macs(variables, images_of(1, 16))) == (379_261_952 - 5120) // 4 + 5120


def test_width_and_extra_and_residual_layers():
    """One convolution of equal width with its norm: 9 C^2 weights, 2 C of the norm."""
    _, more = shapes_of(replace(BASELINE, extra_layers=("layer1", "layer2", "layer3")))
    assert count(more["params"]) - 6_573_120 == sum(9 * c * c + 2 * c for c in (128, 256, 512))
    _, backbone = shapes_of(replace(BASELINE, res_layers=()))
    assert BASELINE.with_width(16).channels == (16, 32, 64, 128)
    assert 6_573_120 - count(backbone["params"]) == sum(2 * (9 * c * c + 2 * c) for c in (128, 512))


def test_initial_weights_have_pytorchs_distribution():
    """U(-b, b) with b = 1/sqrt(fan_in) (section 1.8)."""
    init = replace(BASELINE, channels=(32, 32, 32, 64))(10).init
    params = jax.jit(init)(jax.random.key(0, impl="rbg"), images_of(1, 8))["params"]
    kernels = [params["prep"]["conv"]["kernel"], params["layer3"]["res2"]["conv"]["kernel"], params["linear"]]
    for kernel, fan_in in zip(kernels, (27, 576, 64), strict=True):
        bound = fan_in**-0.5
        assert 0.98 * bound < float(jnp.abs(kernel).max()) <= bound
        assert float(kernel.std()) == pytest.approx(bound / 3**0.5, rel=0.03)


def test_relu_and_celu_golden():
    assert Relu()(jnp.array([-1.0, 2.0])).tolist() == [0.0, 2.0]
    assert float(Celu(0.3)(jnp.float32(-0.3))) == pytest.approx(-0.1896361676, rel=1e-6)
    assert float(Celu(0.075)(jnp.float32(-0.075))) == pytest.approx(-0.0474090419, rel=1e-6)
    assert Celu(0.3)(jnp.array([2.0])).tolist() == [2.0]


@pytest.mark.parametrize("alpha", [0.075, 0.3, 2.0])
def test_celu_slope(alpha):
    """Against JAX's, in float64 and far out."""
    with jax.enable_x64(True):
        x = jnp.asarray([-1e3, -5.0, -0.3, -1e-3, 1e-3, 0.3, 5.0])
        slopes = [jax.vmap(jax.grad(f))(x) for f in (Celu(alpha), lambda x: jax.nn.celu(x, alpha))]
        np.testing.assert_allclose(*slopes, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_pooling_before_the_activation_is_the_same_function(key):
    """A monotonic activation commutes with the maximum; one without `MONOTONIC` stays before a pool of its own."""
    images = images_of(8, 16)
    plain, late, early = (
        ResNet9(**SMALL, pool_order=order, activation=activation)(10)
        for order, activation in (
            ("conv_norm_act_pool", Celu(0.3).__call__),
            ("conv_norm_act_pool", Celu(0.3)),
            ("conv_norm_pool_act", Celu(0.3)),
        )
    )
    variables = early.init(key, images)
    apply = lambda model: jax.jit(model.apply, static_argnums=2)
    for train in (False, True):
        text = lambda model, train=train: apply(model).lower(variables, images, train).as_text()
        assert text(late) == text(early) != text(plain)
        found, expected = (apply(model)(variables, images, train) for model in (late, plain))
        chex.assert_trees_all_close(found, expected, atol=1e-5)
    other = ResNet9(**SMALL, pool_order="conv_pool_norm_act", activation=Celu(0.3))(10)
    assert not np.allclose(apply(other)(variables, images, True)[0], found[0], atol=1e-3)


def norm_alone(**config):
    """A network that is one norm, its variables for maps of three channels, and maps whose groups of four differ."""
    config = BatchNormConfig(**config)
    model = linen_model(GhostBatchNorm(config, PRECISIONS["float32"]), config)
    maps = images_of(8, 4) * jnp.arange(1.0, 9.0)[:, None, None, None] + 1
    return model, model.init(jax.random.key(0), maps), maps


@pytest.mark.parametrize("num_groups", [1, 4])
def test_running_statistics_of_interleaved_groups(num_groups):
    """From init, 0.1 mean and 0.9 + 0.1 unbiased variance of the images n with n % groups == g."""
    model, variables, maps = norm_alone(num_groups=num_groups)
    statistics = model.apply(variables, maps, True)[1]
    for g in range(num_groups):
        group = np.asarray(maps, np.float64)[g::num_groups].reshape(-1, 3)
        np.testing.assert_allclose(statistics["mean"][g], 0.1 * group.mean(0), atol=1e-6)
        np.testing.assert_allclose(statistics["var"][g], 0.9 + 0.1 * group.var(0, ddof=1), rtol=1e-5)


def test_training_normalises_each_group_by_itself():
    """The images of one ghost group do not depend on those of the others."""
    model, variables, maps = norm_alone(num_groups=2)
    changed = maps.at[1::2].apply(jnp.square)  # a mere factor would be normalised away
    before, after = (model.apply(variables, x, True)[0] for x in (maps, changed))
    np.testing.assert_array_equal(before[::2], after[::2])
    assert not np.allclose(before[1::2], after[1::2], atol=1e-3)


def test_evaluation_takes_the_mean_over_groups_or_group_0():
    (merged, variables, maps), (first_group, *_) = (norm_alone(num_groups=4, eval_first_group=f) for f in (False, True))
    statistics = merged.apply(variables, maps, True)[1]
    to_all = lambda merge: jax.tree.map(lambda s: jnp.broadcast_to(merge(s), s.shape), statistics)
    mean, group_0 = to_all(lambda s: s.mean(0, keepdims=True)), to_all(lambda s: s[:1])
    output = lambda model, stats: model.apply({**variables, "batch_stats": stats}, maps, False)[0]
    chex.assert_trees_all_close(output(merged, statistics), output(first_group, mean), rtol=1e-5)
    chex.assert_trees_all_close(output(first_group, statistics), output(merged, group_0), rtol=1e-5)
    chex.assert_trees_all_close(first_group.finalize_batch_stats(statistics), mean, rtol=1e-6)
    chex.assert_trees_all_equal(merged.finalize_batch_stats(statistics), statistics)
    # Merged statistics need not be written back: training continues to the same mean from both.
    after = lambda s: merged.apply({**variables, "batch_stats": s}, maps, True)[1]
    chex.assert_trees_all_close(*(jax.tree.map(lambda s: s.mean(0), after(s)) for s in (statistics, mean)), rtol=1e-5)


@pytest.mark.slow
def test_evaluation_leaves_statistics_and_does_not_mix_images(key):
    images = images_of(4, 8)
    model = replace(FINAL, **SMALL, norm=BatchNormConfig(num_groups=2, train_scale=False))(10)
    variables = model.init(key, images_of(16, 8, seed=1))
    apply = jax.jit(lambda images: model.apply(variables, images, False))
    together, statistics = apply(images)
    chex.assert_trees_all_close(together, jnp.concatenate([apply(image[None])[0] for image in images]), atol=1e-5)
    chex.assert_trees_all_equal(statistics, variables["batch_stats"])


def test_batch_that_ghost_groups_do_not_divide():
    model, variables, maps = norm_alone(num_groups=4)
    with pytest.raises(ValueError, match="batch of 6 images is not 4 equal ghost groups"):
        model.apply(variables, maps[:6], True)


@pytest.mark.parametrize(
    "compute_dtype", ["float32", "mixed", "bfloat16", pytest.param("float16", marks=pytest.mark.slow)]
)
def test_weights_stay_float32_whatever_is_computed(key, compute_dtype):
    model = replace(FINAL, **SMALL)(10, compute_dtype)
    images = images_of(16, 16)
    variables = model.init(key, images)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    logits, statistics = model.apply(variables, images, True)
    assert {leaf.dtype for leaf in (logits, *jax.tree.leaves(statistics))} == {jnp.dtype("float32")}
    exact = replace(FINAL, **SMALL)(10).apply(variables, images, True)[0]
    chex.assert_trees_all_close(logits, exact, atol=0.05 * float(jnp.abs(exact).max()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResNet9(channels=(1, 2, 3)), "four numbers"),
        (lambda: ResNet9(pool_order="pool_first"), "conv_pool_norm_act"),
        (lambda: ResNet9(res_layers=("layer4",)), "layer4"),
        (lambda: BatchNormConfig(num_groups=0), "num_groups 0"),
        (lambda: Celu(0.0), "alpha 0.0"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_gelu_is_the_exact_form():
    """Value and slope against JAX's in float64, and near zero and far out in float32."""
    x = np.linspace(-12, 12, 2001)
    with jax.enable_x64(True):
        value, slope = (jax.vmap(f(lambda x: jax.nn.gelu(x, approximate=False)))(x) for f in (lambda g: g, jax.grad))
        np.testing.assert_allclose(Gelu()(jnp.asarray(x)), value, atol=1e-15)
        np.testing.assert_allclose(jax.vmap(jax.grad(Gelu()))(jnp.asarray(x)), slope, atol=1e-14)
    x32 = jnp.asarray(x, jnp.float32)
    np.testing.assert_allclose(Gelu()(x32), value, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(jax.grad(Gelu()))(x32), slope, rtol=1e-6, atol=1e-6)
    assert Gelu()(x32.astype(jnp.bfloat16)).dtype == jnp.bfloat16
