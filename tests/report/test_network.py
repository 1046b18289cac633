"""The layers of networks and their drawing."""

import dataclasses
from collections import Counter

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from experiments.airbench import airbench94, airbench96
from experiments.bag_of_tricks import baseline, final
from fastcifar_jax.models.activations import Celu
from fastcifar_jax.models.layers import BatchNormConfig, linen_model
from fastcifar_jax.recipe import Recipe
from fastcifar_jax.report import network


class Users(nn.Module):
    """A network as a user would write it, of Linen's own layers."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(8, (5, 3), name="stem")(x)
        x = nn.silu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = x + nn.relu(nn.Conv(8, (1, 1), use_bias=False)(nn.GroupNorm(4)(x)))
        return nn.Dense(10)(x.mean((1, 2)))


def layers_of(net, dtype="float32"):
    return network.layers_of(net(10, dtype), "net")


def leaves(rows):
    """The layers that contain no others."""
    return [row for row in rows if not any(other.path[:-1] == row.path for other in rows if other.path)]


def summary(row):
    return "/".join(row.path), f"{row.type} {row.detail}".strip(), row.shape, row.trained, row.constants


@pytest.mark.parametrize("dtype", ["float32", "mixed"])
def test_layers_of_the_final_network(dtype):
    rows = layers_of(final.model, dtype)
    assert summary(rows[0]) == ("", "ResNet9", (10,), 6_570_880, 2_969)  # section 1.6 of the specification
    assert sum(row.trained for row in leaves(rows)) == 6_570_880
    assert sum(row.constants for row in leaves(rows)) == 2_969
    assert [summary(row) for row in rows[1:11]] == [
        ("whiten", "Whiten 3×3", (32, 32, 27), 0, 729),
        ("prep", "Block", (32, 32, 64), 1792, 64),
        ("prep/conv", "Conv 1×1", (32, 32, 64), 1728, 0),
        ("prep/norm", "GhostBatchNorm", (32, 32, 64), 64, 64),
        ("prep/act", "Activation Celu(alpha=0.3)", (32, 32, 64), 0, 0),
        ("layer1", "Layer", (16, 16, 128), 369_024, 384),
        ("layer1/block", "Block", (16, 16, 128), 73_856, 128),
        ("layer1/block/conv", "Conv 3×3", (32, 32, 128), 73_728, 0),
        ("layer1/block/pool", "MaxPool 2×2", (16, 16, 128), 0, 0),
        ("layer1/block/norm", "GhostBatchNorm", (16, 16, 128), 128, 128),
    ]
    assert [row.path for row in rows if row.type == "Add"] == [("layer1", "add"), ("layer3", "add")]
    assert summary(rows[-1]) == ("linear", "linear", (10,), 5120, 0)


def test_a_norm_that_pools_says_so():
    rows = layers_of(baseline.model)
    norms = {row.path: row.detail for row in rows if row.type == "GhostBatchNorm"}
    assert {norms[f"layer{i}", "block", "norm"] for i in (1, 2, 3)} == {"pool 2×2"} and norms["prep", "norm"] == ""
    assert rows[0].trained == 6_573_120 and sum(row.detail == "Relu()" for row in rows) == 8


@pytest.mark.parametrize(
    "recipe, trained, constants, types",
    [
        (airbench94, 1_971_352, 1_440, {"Whiten": 1, "Activation": 7, "Conv": 6, "MaxPool": 3, "GhostBatchNorm": 6}),
        (
            airbench96, 9_915_416, 3_360,
            {"Whiten": 1, "Activation": 10, "Conv": 9, "MaxPool": 3, "GhostBatchNorm": 9, "Add": 3},
        ),
    ],
)  # fmt: skip
def test_layers_of_airnet(recipe, trained, constants, types):
    rows = layers_of(recipe.model)
    assert (rows[0].trained, rows[0].constants) == (trained, constants)
    assert sum(row.trained for row in leaves(rows)) == trained
    assert sum(row.constants for row in leaves(rows)) == constants
    assert Counter(row.type for row in leaves(rows)) == types | {"linear": 1}
    assert summary(rows[1]) == ("whiten", "Whiten 2×2", (31, 31, 24), 24, 288)


def test_layers_of_a_users_network():
    rows = layers_of(lambda *_: linen_model(Users(), BatchNormConfig()))
    assert [summary(row) for row in rows[1:]] == [
        ("stem", "Conv 5×3", (32, 32, 8), 5 * 3 * 3 * 8 + 8, 0),
        ("BatchNorm_0", "BatchNorm", (32, 32, 8), 16, 0),
        ("GroupNorm_0", "GroupNorm", (16, 16, 8), 16, 0),
        ("Conv_0", "Conv 1×1", (16, 16, 8), 64, 0),
        ("Dense_0", "Dense", (10,), 90, 0),
    ]


@pytest.mark.parametrize("function, detail", [(Celu(0.5), "Celu(alpha=0.5)"), (jax.nn.silu, "silu")])
def test_an_activation_has_the_name_of_its_function(function, detail):
    rows = layers_of(dataclasses.replace(baseline.model, activation=function))
    assert sum(row.detail == detail for row in rows) == 8


@pytest.mark.parametrize("recipe", [Recipe(name="default"), final, airbench96])
def test_a_drawing_has_nested_boxes_coloured_by_type(recipe):
    rows = layers_of(recipe.model)
    [axis] = network.draw(rows, "the title").axes
    assert axis.get_title() == f"the title: {rows[0].trained:,} trained parameters, {rows[0].constants:,} constants"
    boxes = {row.path: patch for row, patch in zip(rows[1:], axis.patches, strict=True)}
    spans = {path: box.get_path().get_extents(box.get_patch_transform()) for path, box in boxes.items()}
    for path, span in spans.items():
        if path[:-1]:
            outer = spans[path[:-1]]
            assert outer.x0 < span.x0 and span.x1 < outer.x1 and outer.y0 < span.y0 and span.y1 < outer.y1
    siblings = [span for path, span in spans.items() if len(path) == 1]
    assert all(above.y1 < below.y0 for above, below in zip(siblings, siblings[1:], strict=False))
    colours = {row.type: boxes[row.path].get_facecolor() for row in leaves(rows)[1:]}
    assert len(set(colours.values())) == len(colours)
    texts = [text.get_text() for text in axis.texts]
    for row in rows[1:]:
        assert row.path[-1] in texts and "×".join(map(str, row.shape)) in texts
        assert not row.trained or f"{row.trained:,}" in texts


def test_a_layer_of_an_unknown_type_is_drawn():
    class Odd(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Embed(10, 10, name="table")(jnp.int32(x.mean((1, 2, 3))))

    [axis] = network.draw(layers_of(lambda *_: linen_model(Odd(), BatchNormConfig())), "odd").axes
    assert len(axis.patches) == 1 and "Embed" in [text.get_text() for text in axis.texts]
