"""What does a training step become on a GPU? Compiles recipes for cards that are not present, and reads the program.

    python -m venv gpu && gpu/bin/pip install -e . "jax[cuda12]"      # 6 GB; neither a driver nor a GPU is needed
    gpu/bin/python -m benchmarks.compile_for_gpu final airbench94 --gpu a100 --dtype float16

Prints a row of Markdown per recipe, card and dtype: kernels per step, bytes that they read and write (each operand and
result once per kernel), temporary memory, dtype of the convolutions, what makes the host wait inside the loop, and the
floor of a run: its steps at the card's peak of products plus their bytes at its bandwidth, one after the other.
`--devices 8` splits the batch and adds the collectives of a step with their bytes. `--kernels 20` lists the kernels
that move the most. Nothing runs and autotuning is off, so nothing here is a time; errors about a missing driver are
harmless. Answers: docs/gpu.md.
"""

import argparse
import collections
import itertools
import math
import os
import re
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fastcifar_jax.functions import make_functions, shapes_of
from fastcifar_jax.hparams import hparams
from fastcifar_jax.recipe import Recipe, override
from fastcifar_jax.runs import experiments
from fastcifar_jax.schedules import count_steps
from fastcifar_jax.types import Dataset


class Card(NamedTuple):
    """What XLA wants to know of a card, and its datasheet."""

    name: str
    capability: str
    cores: int
    fpus_per_core: int
    shared_memory: int  # bytes per core
    shared_memory_per_block: int  # bytes, opted in
    l2_cache: int  # bytes
    clock_ghz: float
    memory: int  # bytes
    bandwidth: float  # bytes per second
    flops: float  # half-precision products per second, dense


CARDS = {
    "v100": Card("Tesla V100-SXM2-16GB", "major: 7", 80, 64, 98304, 98304, 6 << 20, 1.53, 16 << 30, 0.9e12, 125e12),
    "a100": Card(
        "NVIDIA A100-SXM4-80GB", "major: 8", 108, 64, 167936, 166912, 40 << 20, 1.41, 80 << 30, 2.04e12, 312e12
    ),
    "h100": Card(
        "NVIDIA H100 80GB HBM3",
        "major: 9 feature_extension: ACCELERATED_FEATURES",
        132, 128, 233472, 232448, 50 << 20, 1.98, 80 << 30, 3.35e12, 989e12,
    ),
}  # fmt: skip
ITEMSIZE = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8}
FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "iota", "after-all"}  # launch no kernel
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<shape>.*?) (?P<op>[\w-]+)\((?P<rest>.*)")
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


class Kernel(NamedTuple):
    """One kernel of the loop."""

    kind: str
    size: int  # bytes read and written
    shape: str  # of the result
    origin: str  # JAX operation


def target_config(card: Card) -> str:
    """The description of a card that XLA takes in place of a device, as a text protocol buffer."""
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: {card.shared_memory}
  shared_memory_per_block_optin: {card.shared_memory_per_block}
  core_count: {card.cores} fpus_per_core: {card.fpus_per_core} clock_rate_ghz: {card.clock_ghz}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: {card.bandwidth:.0f} l2_cache_size: {card.l2_cache} device_memory_size: {card.memory}
  cuda_compute_capability {{ {card.capability} }}
  dnn_version: "9.10.0" driver_version: "13.0.0" runtime_version: "12.9.0" compile_time_toolkit_version: "12.9.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{card.name}"
"""


def compile_epoch(recipe: Recipe, card: Card, num_devices: int = 1, num_train: int = 50_000):
    """The steps of an epoch on CIFAR-10, compiled for a card, or for several that share the batches."""
    topology = topologies.get_topology_desc(
        platform="cuda", topology=f"1x1x{num_devices}", target_config=target_config(card)
    )
    mesh = Mesh(np.array(topology.devices), ("batch",), axis_types=(AxisType.Auto,))
    images = lambda n: jax.ShapeDtypeStruct((n, 32, 32, 3), jnp.uint8)
    labels = lambda n: jax.ShapeDtypeStruct((n,), jnp.int32)
    dataset = Dataset(images(num_train), labels(num_train), images(10_000), labels(10_000))
    functions = make_functions(recipe, 10, num_train)
    _, number, state, totals, plan = shapes_of(functions, recipe, dataset)
    steps = num_train // recipe.batch_size
    train_steps = lambda *args: functions.train_steps(*args, steps)
    copies = NamedSharding(mesh, P())
    jitted = jax.jit(train_steps, donate_argnums=(1, 2), in_shardings=copies, out_shardings=copies)
    with jax.set_mesh(mesh):
        traced = jitted.trace(hparams(recipe), state, totals, dataset, plan, number)
        return traced.lower(lowering_platforms=("cuda",)).compile({"xla_gpu_autotune_level": 0})


def computations(text: str) -> dict[str, list[re.Match]]:
    """The instructions of each computation of an optimised program."""
    found: dict[str, list[re.Match]] = {}
    body: list[re.Match] = []
    for line in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\) -> .* \{", line):
            body = found.setdefault(head[1], [])
        elif instruction := INSTRUCTION.match(line):
            body.append(instruction)
    return found


def bytes_of(shape: str) -> int:
    """Bytes of all arrays in a shape as XLA prints it."""
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", shape)
    return sum(ITEMSIZE.get(dtype, 0) * math.prod(int(n) for n in dims.split(",") if n) for dtype, dims in arrays)


def kernels_of_loop(text: str) -> tuple[list[Kernel], bool]:
    """The kernels in the body of the largest loop, and whether its trip count is known."""
    found = computations(text)
    loops = [i for body in found.values() for i in body if i["op"] == "while"]
    body_of = lambda loop: found.get(re.search(r"body=%?([\w.-]+)", loop["rest"])[1], [])
    loop = max(loops, key=lambda loop: len(body_of(loop)))
    shapes = {i["name"]: i["shape"] for i in body_of(loop)}
    kernels = []
    for i in body_of(loop):
        if i["op"] in FREE:
            continue
        kind = i["op"]
        for pattern in (r'custom_call_target="([^"]+)"', r"kind=k(\w+)"):
            kind = match[1] if (match := re.search(pattern, i["rest"])) else kind
        operands = re.findall(r"%([\w.-]+)", i["rest"].split("), ")[0])
        size = bytes_of(i["shape"]) + sum(bytes_of(shapes.get(name, "")) for name in operands)
        origin = re.search(r'op_name="([^"]*)"', i["rest"])
        kernels.append(Kernel(kind, size, i["shape"].split("{")[0], origin[1] if origin else i["name"]))
    return kernels, "known_trip_count" in loop["rest"]


def conv_dtypes(kernels: list[Kernel]) -> str:
    """The dtypes that the convolutions of a step compute in."""
    convs = [kernel for kernel in kernels if "conv" in kernel.kind and "$" in kernel.kind]
    counts = collections.Counter(re.match(r"\(?(\w+)\[", kernel.shape)[1] for kernel in convs)
    return ", ".join(f"{count} {dtype}" for dtype, count in counts.most_common())


def floor_seconds(recipe: Recipe, card: Card, step_bytes: int, num_devices: int, num_train: int = 50_000) -> float:
    """The least seconds that the steps of a run could take: forward and two gradients are products of one size."""
    model = recipe.model(10, recipe.compute_dtype)
    images = jax.ShapeDtypeStruct((recipe.batch_size, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)), images)
    macs = sum(jax.tree.leaves(model.macs(variables, images))) * recipe.batch_size / num_devices
    num_steps = count_steps(recipe.num_epochs, num_train // recipe.batch_size)
    return num_steps * (6 * macs / card.flops + step_bytes / card.bandwidth)


def row(recipe: Recipe, card: Card, num_devices: int, text: str, temporary_bytes: int) -> str:
    """A row of the table."""
    kernels, known = kernels_of_loop(text)
    size = sum(kernel.size for kernel in kernels)
    waits = [kernel.kind for kernel in kernels if kernel.kind in ("while", "conditional")]
    waits += [] if known else ["trip count"]
    shared = [kernel for kernel in kernels if kernel.kind.removesuffix("-start") in COLLECTIVES]
    floor = floor_seconds(recipe, card, size, num_devices)
    cells = (
        f"`{recipe.name}`", recipe.compute_dtype, card.name, len(kernels), f"{size / 1e9:.2f}",
        f"{floor:.2f}", f"{temporary_bytes / 2**20:,.0f}", conv_dtypes(kernels),
        ", ".join(waits) or "none", f"{len(shared)}, {sum(k.size for k in shared) / 2e6:.1f} MB" if shared else "",
    )  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    """Compiles every recipe for every card in every dtype."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--gpu", nargs="+", default=["a100"], choices=CARDS)
    parser.add_argument("--dtype", nargs="+", default=["float16"])
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--kernels", type=int, default=0, help="also list this many, by bytes")
    parser.add_argument("--hlo", type=Path, help="keep the last optimised program here")
    asked = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # nothing runs on the card
    os.environ["FASTCIFAR_CONV"] = "lax"  # as on a card
    print(
        "| recipe | dtype | card | kernels | GB | floor s | temporary MiB | convolutions | host waits | collectives |"
    )
    print("| :-- | :-- | :-- | --: | --: | --: | --: | :-- | :-- | :-- |")
    declared = experiments.resolve(asked.recipes, experiments.default_folder())
    for experiment, gpu, dtype in itertools.product(declared, asked.gpu, asked.dtype):
        recipe = override(experiment.recipe, f"compute_dtype={dtype}")
        for assignment in asked.set:
            recipe = override(recipe, assignment)
        compiled = compile_epoch(recipe, CARDS[gpu], asked.devices)
        text = compiled.as_text()
        temporary_bytes = compiled.memory_analysis().temp_size_in_bytes
        print(row(recipe, CARDS[gpu], asked.devices, text, temporary_bytes), flush=True)
        for kernel in sorted(kernels_of_loop(text)[0], key=lambda kernel: -kernel.size)[: asked.kernels]:
            print(f"    {kernel.size / 1e6:8.1f} MB  {kernel.kind:20} {kernel.shape:44} {kernel.origin}")
        if asked.hlo:
            asked.hlo.write_text(text)


if __name__ == "__main__":
    main()
