"""One contender of a benchmark, in a process of its own: takes training steps each time it is asked to.

The parent writes a JSON object with the task on the first line of standard input, then one line per turn; the answers
are lines of JSON on standard output.
"""

import functools
import json
import math
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastcifar_jax.data.load import load_data
from fastcifar_jax.functions import zero_totals
from fastcifar_jax.hparams import hparams
from fastcifar_jax.models.base import PRECISIONS
from fastcifar_jax.ops import backend, conv
from fastcifar_jax.recipe import Recipe, change
from fastcifar_jax.runs import experiments
from fastcifar_jax.train import compile_run
from fastcifar_jax.types import Dataset

CPU_STEPS, GPU_STEPS = 2, 50  # at a time: as many that are not timed and as many that are, in every turn

Prepared = tuple[Callable[[], None], int, dict[str, Any]]  # takes steps; how many; what is known about it


def prepare_jax(recipe: Recipe, num_classes: int, dataset: Dataset) -> Prepared:
    """The first steps of an epoch, again and again, by the programs of a run."""
    dataset = jax.device_put(dataset)
    run = compile_run(recipe, num_classes, dataset)
    values, key = hparams(recipe), jax.random.key(0)
    carry, plan = (run.init(key, dataset), zero_totals(recipe)), run.plan(key, np.int32(1), dataset)
    steps = min(run.steps_per_epoch, CPU_STEPS if jax.default_backend() == "cpu" else GPU_STEPS)
    per_call = 1 if run.loop == "step" else steps

    def take():
        nonlocal carry
        for start in range(0, steps, per_call):
            carry = run.train_steps(1, values, dataset, plan, carry, start, per_call)
        jax.block_until_ready(carry)

    known = {"compile_seconds": run.seconds, "conv": backend.conv_backend()[0], "version": jax.__version__}
    return take, steps, known


def prepare_torch(recipe: Recipe, num_classes: int, dataset: Dataset, compiled: bool, tuned: bool) -> Prepared:
    """The same in PyTorch; see `torch_baseline.bench.prepare`."""
    from fastcifar_jax.torch_baseline import bench, train  # an extra that the other contenders do without

    take, on_gpu = bench.prepare(recipe, num_classes, dataset, compiled=compiled, tuned=tuned)
    start = time.perf_counter()
    take(1)
    seconds, steps = time.perf_counter() - start, GPU_STEPS if on_gpu else CPU_STEPS
    return functools.partial(take, steps), steps, {"compile_seconds": seconds, "version": train.versions()["torch"]}


def layer_rates(recipe: Recipe, num_classes: int, repeats: int = 5) -> dict[str, Any]:
    """GFLOP/s of every convolution and pass of a recipe's network, and of one large product for comparison.

    Args:
      recipe: its batch size, network and compute dtype are used, on images of 32x32.
      num_classes: size of the logits.
      repeats: how often each is timed; the fastest counts.

    Returns:
      `{"layers": {name: {"shape": ..., "forward": ..., "input": ..., "weight": ...}}, "ceiling": GFLOP/s}`.
    """
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
    """Reads the task and answers until standard input ends."""
    task = json.loads(sys.stdin.readline())
    folder = Path(task["folder"]) if task["folder"] else None
    path = Path(task["path"])
    declared = experiments.resolve((task["experiment"] if path.parent == folder else str(path),), folder)
    [experiment] = (e for e in declared if e.recipe.name == task["experiment"])
    if task["kind"] != "torch":
        backend.configure()  # before TensorFlow may be imported to read data
    dataset, info = load_data(task["data"], limit_train=task["limit_train"])
    recipe, num_classes = change(experiment.recipe, task["set"], None, task["width"], task["dtype"]), len(info.classes)
    if task["kind"] == "layers":
        _answer(**layer_rates(recipe, num_classes))
        return
    if task["kind"] == "jax":
        take, steps, known = prepare_jax(recipe, num_classes, dataset)
    else:
        take, steps, known = prepare_torch(recipe, num_classes, dataset, task["compiled"], task["tuned"])
    take()
    _answer(**known, data={"source": info.source, "hash": info.hash})
    for _ in sys.stdin:
        take()  # untimed: memory that was idle while others ran may have to come back first
        start = time.perf_counter()
        take()
        seconds = (time.perf_counter() - start) / steps
        _answer(seconds=seconds, peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def _answer(**values: Any) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
