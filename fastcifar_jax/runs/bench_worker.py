"""One contender of a benchmark, in a process of its own: takes training steps each time it is told to.

The parent writes a JSON object with the task on the first line of standard input, then one line for every turn; the
answers are lines of JSON on standard output.
"""

import functools
import importlib
import itertools
import json
import math
import resource
import sys
import time
from pathlib import Path

import numpy as np

from fastcifar_jax.data.load import load_data
from fastcifar_jax.ops import backend, conv
from fastcifar_jax.recipe import change
from fastcifar_jax.runs import experiments as discover
from fastcifar_jax.runs import provenance

STEPS = 2  # at a time: two that are not timed and two that are, in every turn


def prepare_jax(recipe, dataset, num_classes):
    """Returns a function that takes steps of a recipe, as training takes them, and what is known about it."""
    import jax
    import jax.numpy as jnp

    from fastcifar_jax.train import make_functions, shapes_of, zero_totals

    backend.configure_cpu()
    dataset = jax.device_put(dataset)
    functions = make_functions(recipe, num_classes, len(dataset.train_labels))
    shapes = shapes_of(functions, recipe, dataset)
    steps_per_epoch = len(dataset.train_labels) // recipe.batch_size

    def steps(state, totals, dataset, plan, first):
        def body(carry, i):
            return functions.train_batch(*carry, dataset, plan, i % steps_per_epoch), None

        return jax.lax.scan(body, (state, totals), first + jnp.arange(STEPS))[0]

    start = time.perf_counter()
    lowered = jax.jit(steps, donate_argnums=(0, 1)).lower(
        shapes.state, shapes.totals, dataset, shapes.plan, shapes.index
    )
    program = lowered.compile(backend.compiler_options())
    seconds = time.perf_counter() - start
    state = jax.jit(functions.init)(jax.random.key(0), dataset)
    plan = jax.jit(functions.plan)(jax.random.key(0), jnp.int32(1), dataset)
    carry = [state, zero_totals(recipe)]

    def take(first):
        carry[:] = jax.block_until_ready(program(*carry, dataset, plan, np.int32(first)))

    return take, {"compile_seconds": seconds, "conv": backend.conv_backend()[0], "version": jax.__version__}


def prepare_torch(recipe, dataset, num_classes, twin, dtype, compiled, tuned):
    """The same for the PyTorch twin; `tuned` gives it the memory settings that JAX gets here."""
    import torch

    if tuned:
        backend.keep_freed_memory()
    torch.set_num_threads(provenance.device()["cores"])
    pad = next((a.padding for a in recipe.augmentations if hasattr(a, "padding")), 0)
    padded = np.pad(dataset.train_images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="reflect")
    images, labels = torch.from_numpy(padded), torch.from_numpy(dataset.train_labels).long()
    steps_per_epoch = len(labels) // recipe.batch_size
    step = twin.make_train_step(recipe, num_classes, steps_per_epoch, bfloat16=dtype == "bfloat16", compiled=compiled)
    order = torch.randperm(len(labels))
    ids = lambda i: order[i % steps_per_epoch * recipe.batch_size :][: recipe.batch_size]

    def take(first):
        for i in range(first, first + STEPS):
            step(images, labels, ids(i))

    start = time.perf_counter()
    step(images, labels, ids(0))
    seconds = time.perf_counter() - start
    return take, {"compile_seconds": seconds, "version": torch.__version__}


def layer_rates(recipe, num_classes: int, repeats: int = 5) -> dict:
    """GFLOP/s of every convolution and pass of a recipe's network, and of one large product for comparison.

    Args:
      recipe: its batch size, network and compute dtype are used, on images of 32x32.
      num_classes: size of the logits.
      repeats: the fastest of so many is taken.

    Returns:
      `{"layers": {name: {"shape": ..., "forward": ..., "input": ..., "weight": ...}}, "ceiling": GFLOP/s}`.
    """
    import jax
    import jax.numpy as jnp

    from fastcifar_jax.models.base import PRECISIONS

    backend.configure_cpu()
    precision = PRECISIONS[recipe.compute_dtype]
    model = recipe.model(num_classes, recipe.compute_dtype)
    images = jax.ShapeDtypeStruct((recipe.batch_size, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)), images)
    macs = model.macs(variables, images)

    def rate(work, f, *args):
        f = jax.jit(f)
        jax.block_until_ready(f(*args))
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            jax.block_until_ready(f(*args))
            times.append(time.perf_counter() - start)
        return work / min(times) / 1e9

    def passes(batch, side, shape):
        key = jax.random.key(0)
        x = jax.random.normal(key, (batch, side, side, shape[2]), precision.activations)
        kernel = jax.random.normal(key, shape, precision.params)
        y = jax.random.normal(key, (batch, side, side, shape[3]), precision.activations)
        work = 2 * batch * side * side * math.prod(shape)
        apply = lambda x, kernel: conv.conv(x, kernel, precision.operands)
        return {
            "forward": rate(work, apply, x, kernel),
            "input": rate(work, lambda x, k, y: jax.vjp(lambda x: apply(x, k), x)[1](y), x, kernel, y),
            "weight": rate(work, lambda x, k, y: jax.vjp(lambda k: apply(x, k), k)[1](y), x, kernel, y),
        }

    layers = {}
    for path, kernel in jax.tree_util.tree_leaves_with_path(variables["params"]):
        keys = [entry.key for entry in path]
        if keys[-2:] == ["conv", "kernel"]:
            counts = functools.reduce(lambda tree, key: tree[key], keys[:-1], macs)
            side = math.isqrt(counts["macs"][0] // kernel.size)
            height, width, inputs, outputs = kernel.shape
            rates = passes(recipe.batch_size, side, kernel.shape)
            layers["/".join(keys[:-2])] = {"shape": f"{height}x{width} {inputs}->{outputs} @{side}", **rates}
    return {"layers": layers, "ceiling": passes(16, 16, (1, 1, 2048, 2048))["forward"]}


def main() -> None:
    """Reads the task and obeys."""
    task = json.loads(sys.stdin.readline())
    folder = Path(task["folder"]) if task["folder"] else None
    path = Path(task["path"])
    declared = discover.resolve((task["experiment"] if path.parent == folder else str(path),), folder)
    [experiment] = (e for e in declared if e.recipe.name == task["experiment"])
    dataset, info = load_data(task["data"], limit_train=task["limit_train"])
    recipe = change(experiment.recipe, task["set"], None, task["width"], task["dtype"])
    answer = lambda **values: print(json.dumps(values), flush=True)
    if task["kind"] == "layers":
        answer(**layer_rates(recipe, len(info.classes)))
        return
    if task["kind"] == "jax":
        take, known = prepare_jax(recipe, dataset, len(info.classes))
    else:
        twin = importlib.import_module("fastcifar_jax.torch_baseline.train")
        take, known = prepare_torch(
            recipe, dataset, len(info.classes), twin, task["torch_dtype"], task["compiled"], task["tuned"]
        )
    first = itertools.count(step=STEPS)
    take(next(first))
    answer(**known, data={"source": info.source, "hash": info.hash})
    for _ in sys.stdin:
        take(next(first))  # untimed: memory that lay idle while others ran may have to come back first
        start = time.perf_counter()
        take(next(first))
        seconds = (time.perf_counter() - start) / STEPS
        answer(seconds=seconds, peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


if __name__ == "__main__":
    main()
