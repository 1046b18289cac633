import dataclasses
import shutil
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import flax.linen as nn
import jax.numpy as jnp
import pytest
from PIL import Image

from experiments.airbench import airbench94
from experiments.bag_of_tricks import baseline, final
from fastcifar_jax.models.activations import Celu
from fastcifar_jax.models.base import Model
from fastcifar_jax.models.layers import BatchNormConfig, linen_model
from fastcifar_jax.report import network as drawing
from fastcifar_jax.report.graph import graph_of
from fastcifar_jax.runs import experiments as discover
from tests.helpers_plot import NORMED

needs_dot = pytest.mark.skipif(shutil.which("dot") is None, reason="needs Graphviz's program dot")


class Users(nn.Module):
    """A network as a user would write it, of Linen's own layers."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(8, (5, 3), name="stem")(x)
        x = nn.silu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        y = nn.gelu(nn.LayerNorm()(x))
        x = x + nn.relu(nn.Conv(8, (1, 1), use_bias=False)(nn.GroupNorm(4)(y)))
        return nn.Dense(10)(x.mean((1, 2)))


def graph_from(path):
    [experiment] = discover.resolve((str(path),), None)
    return graph_of(experiment.recipe.model(10, "float32"))


def line_of(layer):
    return (layer.label, "/".join(layer.scope), layer.shape, layer.trained, layer.frozen)


@pytest.mark.parametrize("dtype", ["float32", "mixed"])
def test_layers_of_the_final_network(dtype):
    graph = graph_of(final.model(10, dtype))
    assert (graph.trained, graph.frozen) == (6_570_880, 2_969)  # section 1.6 of the specification
    assert sum(layer.trained for layer in graph.layers) == graph.trained
    assert sum(layer.frozen for layer in graph.layers) == graph.frozen
    kinds = Counter(layer.kind for layer in graph.layers)
    assert kinds == {
        "images": 1, "convolution": 9, "norm": 8, "activation": 8, "pool": 4, "join": 2, "linear": 1,
    }  # fmt: skip
    assert [line_of(layer) for layer in graph.layers[:8]] == [
        ("images", "", (32, 32, 3), 0, 0),
        ("conv 3×3", "whiten", (32, 32, 27), 0, 729),
        ("conv 1×1", "prep/conv", (32, 32, 64), 1728, 0),
        ("norm", "prep/norm", (32, 32, 64), 64, 64),
        ("celu", "prep", (32, 32, 64), 0, 0),
        ("conv 3×3", "layer1/block/conv", (32, 32, 128), 73_728, 0),
        ("max pool 2×2", "layer1/block", (16, 16, 128), 0, 0),
        ("norm", "layer1/block/norm", (16, 16, 128), 128, 128),
    ]
    assert [line_of(layer) for layer in graph.layers[-2:]] == [
        ("global max pool", "", (1, 1, 512), 0, 0),
        ("linear", "", (10,), 5120, 0),
    ]


def test_a_residual_joins_the_input_of_its_branch():
    graph = graph_of(final.model(10, "float32"))
    for layer in (layer for layer in graph.layers if layer.kind == "join"):
        ends = [graph.layers[i] for i in layer.inputs]
        [name] = layer.scope
        assert layer.label == "add" and name in ("layer1", "layer3")
        assert [end.scope for end in ends] == [(name, "block"), (name, "res2")]
        assert [end.label for end in ends] == ["celu", "celu"]
    assert all(len(layer.inputs) == 1 for layer in graph.layers[1:] if layer.kind != "join")


def test_a_norm_that_pools_says_so():
    graph = graph_of(baseline.model(10, "float32"))
    assert graph.trained == 6_573_120 == sum(layer.trained for layer in graph.layers)
    norms = {"/".join(layer.scope): layer.label for layer in graph.layers if layer.kind == "norm"}
    assert {norms[f"layer{i}/block/norm"] for i in (1, 2, 3)} == {"norm, pool 2×2"} and norms["prep/norm"] == "norm"
    assert Counter(layer.label for layer in graph.layers)["relu"] == 8


def test_layers_of_airnet():
    graph = graph_of(airbench94.model(10, "float32"))
    assert sum(layer.trained for layer in graph.layers) == graph.trained == 1_971_352
    assert sum(layer.frozen for layer in graph.layers) == graph.frozen == 288 + 1_152
    assert line_of(graph.layers[1]) == ("conv 2×2", "whiten", (31, 31, 24), 24, 288)
    labels = Counter(layer.label for layer in graph.layers)
    assert labels == {
        "images": 1, "conv 2×2": 1, "conv 3×3": 6, "norm": 6, "gelu": 7, "max pool 2×2": 3, "global max pool": 1,
        "linear": 1,
    }  # fmt: skip
    deeper = graph_of(dataclasses.replace(airbench94.model, convs=3)(10, "float32"))
    assert sum(layer.kind == "join" for layer in deeper.layers) == 3


def test_layers_of_a_users_network():
    graph = graph_of(linen_model(Users(), BatchNormConfig()))
    assert [line_of(layer)[:3] for layer in graph.layers] == [
        ("images", "", (32, 32, 3)),
        ("conv 5×3", "stem", (32, 32, 8)),
        ("norm", "BatchNorm_0", (32, 32, 8)),
        ("silu", "", (32, 32, 8)),
        ("max pool 2×2", "", (16, 16, 8)),
        ("norm", "LayerNorm_0", (16, 16, 8)),
        ("activation", "", (16, 16, 8)),  # gelu by tanh, which has no name in the trace
        ("norm", "GroupNorm_0", (16, 16, 8)),
        ("conv 1×1", "Conv_0", (16, 16, 8)),
        ("relu", "", (16, 16, 8)),
        ("add", "", (16, 16, 8)),
        ("global mean pool", "", (8,)),
        ("linear", "Dense_0", (10,)),
    ]
    counts = [layer.trained for layer in graph.layers if layer.trained]
    assert counts == [5 * 3 * 3 * 8 + 8, 16, 16, 16, 64, 90] and sum(counts) == graph.trained


def test_layers_of_a_plain_pair_are_where_their_parameters_are(tmp_path):
    (tmp_path / "normed.py").write_text(NORMED)
    graph = graph_from(tmp_path / "normed.py")
    assert [line_of(layer) for layer in graph.layers] == [
        ("images", "", (32, 32, 3), 0, 0),
        ("conv 1×1", "layer1/conv", (32, 32, 4), 12, 0),
        ("norm", "layer1/norm", (32, 32, 4), 8, 0),
        ("max", "", (32, 32, 4), 0, 0),
        ("conv 1×1", "layer2", (32, 32, 4), 16, 0),
        ("tanh", "", (32, 32, 4), 0, 0),
        ("add", "", (32, 32, 4), 0, 0),
        ("max pool 2×2", "", (16, 16, 4), 0, 0),
        ("global mean pool", "", (4,), 0, 0),
        ("linear", "", (10,), 40, 0),
    ]
    assert [layer.inputs for layer in graph.layers] == [(), (0,), (1,), (2,), (3,), (4,), (3, 5), (6,), (7,), (8,)]
    assert graph.trained == 76


def test_a_product_of_two_branches_is_a_layer_of_its_own():
    def init(key, images):
        return {"params": {"w": jnp.zeros((3, 10))}, "constants": {}, "batch_stats": {}}

    def apply(variables, images, train):
        x = images.reshape(len(images), -1, 3)
        return (jnp.einsum("nij,nik->njk", x, jnp.tanh(x)) @ variables["params"]["w"]).sum(1), {}

    graph = graph_of(Model(init, apply, lambda stats: stats, lambda variables, images: {}))
    assert [layer.label for layer in graph.layers] == ["images", "tanh", "linear", "linear", "global mean pool"]
    assert [layer.inputs for layer in graph.layers] == [(), (0,), (0, 1), (2,), (3,)]


def test_an_activation_bears_the_name_of_its_function():
    net = dataclasses.replace(baseline.model, activation=Celu(0.3))
    assert sum(layer.label == "celu" for layer in graph_of(net(10, "float32")).layers) == 8


def test_the_source_of_a_drawing():
    source = drawing.draw(graph_of(final.model(10, "float32")), "final").source
    assert source.count("subgraph cluster") == 1 + 3 + 3 + 4  # prep, layers, their blocks, two residual pairs
    assert 'label="final\n6,570,880 parameters, 2,969 frozen' in source
    assert "whiten: conv 3×3\n32×32×27\n729 frozen" in source
    assert '"conv 3×3\n32×32×128\n73,728 parameters"' in source
    assert '"layer1\\l369,024\\l384 frozen\\l"' in source
    assert source.count(drawing.LOOKS["norm"][0]) == 8 and source.count(drawing.LOOKS["convolution"][0]) == 9
    assert source.count(" -> ") == 32 + 2
    for looks in zip(*drawing.LOOKS.values(), strict=True):  # told apart by colour, and by shape
        assert len(set(looks)) >= len(drawing.LOOKS) - 1


def test_what_dot_says_is_passed_on(workplace, call, monkeypatch):
    monkeypatch.setenv("PATH", str(workplace))
    Path("dot").write_text("#!/bin/sh\necho 'Format: \"svg\" not recognized' >&2\nexit 1\n")
    Path("dot").chmod(0o755)
    status, out, err = call("plot", "network", "trick.py", "--out", "net.svg")
    assert (status, err) == (0, "") and "not recognized" in out and Path("net.dot").exists()


@needs_dot
@pytest.mark.parametrize("form", ["png", "svg"])
def test_the_command_draws(workplace, call, form):
    status, out, _ = call("plot", "network", "final", "--width", "4", "--out", f"net.{form}")
    path = Path(f"net.{form}")
    assert status == 0 and f"wrote net.{form}" in out
    if form == "png":
        with Image.open(path) as image:
            image.verify()
    else:
        root = ElementTree.parse(path).getroot()
        kinds = Counter(group.get("class") for group in root.iter("{http://www.w3.org/2000/svg}g"))
        assert kinds["node"] == 33 and kinds["edge"] == 34
    before = path.read_bytes()
    assert call("plot", "network", "final", "--width", "4", "--out", str(path))[0] == 0
    assert path.read_bytes() == before and not list(Path().glob("*.dot"))


def test_without_dot_the_source_is_written(workplace, call, monkeypatch):
    monkeypatch.setenv("PATH", str(workplace))
    status, out, err = call("plot", "network", "trick.py", "--out", "net.svg")
    assert (status, err) == (0, "") and "dot is not installed" in out and "wrote net.dot" in out
    assert Path("net.dot").read_text().startswith("digraph") and not Path("net.svg").exists()


def test_without_graphviz(workplace, call, monkeypatch):
    monkeypatch.setitem(sys.modules, "graphviz", None)
    status, _, err = call("plot", "network", "trick.py", "--out", "net.svg")
    assert status == 2 and "drawings need graphviz" in err and "pip install -e '.[plot]'" in err
    assert not list(Path().glob("net.*"))
