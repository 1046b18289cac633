"""How much time does reshaping the maps into ghost groups cost a norm?

    python benchmarks/norms.py --shape 1024,31,31,64 --groups 1 --activation gelu
    python benchmarks/norms.py --shape 512,32,32,128 --groups 16 --activation celu

Max-pool, norm and activation with all gradients, on random maps: by `normalize_groups`, and by the definition over
[batch / groups, groups, height, width, channels], differentiated by JAX. Both take turns within one process, at least 5
each; printed are medians with the least and the largest, and the ratio.

Answer (2 cores of an AMD EPYC, AVX-512, jax 0.10.2, two runs of each line above): about as much time again. 57 and 60
ms against 124 and 130 ms, ratios 2.19 (2.09 to 2.78) and 2.14 (1.97 to 2.52); with 16 groups and CELU 71 and 72 ms
against 147 and 144 ms, ratios 1.99 (1.50 to 2.62) and 2.01 (1.94 to 2.46).
"""

import statistics
import sys
import time
from pathlib import Path

import click
import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).parent.parent))

from fastcifar_jax.models.activations import Celu, Gelu  # noqa: E402
from fastcifar_jax.ops import backend  # noqa: E402
from fastcifar_jax.ops.batch_norm import normalize_groups  # noqa: E402
from fastcifar_jax.ops.max_pool import max_pool  # noqa: E402

EPS = 1e-5


def by_definition(x, scale, bias, groups):
    grouped = x.reshape(len(x) // groups, groups, *x.shape[1:])
    mean = grouped.mean((0, 2, 3), keepdims=True)
    variance = jnp.square(grouped - mean).mean((0, 2, 3), keepdims=True)
    return ((grouped - mean) * jax.lax.rsqrt(variance + EPS)).reshape(x.shape) * scale + bias


@click.command()
@click.option("--shape", default="1024,31,31,64", show_default=True, help="Batch, rows, columns, channels.")
@click.option("--groups", type=click.IntRange(1), default=1, show_default=True)
@click.option("--activation", type=click.Choice(("celu", "gelu")), default="gelu", show_default=True)
@click.option("--rounds", type=click.IntRange(5), default=9, show_default=True)
def main(shape, groups, activation, rounds):
    backend.configure()
    x = jax.random.normal(jax.random.key(0), tuple(map(int, shape.split(","))))
    scale, bias = jnp.ones(x.shape[-1]), jnp.zeros(x.shape[-1])
    activate = Celu() if activation == "celu" else Gelu()
    norms = {
        "batch_norm.py": lambda *args: normalize_groups(*args, jnp.zeros((groups, x.shape[-1])), groups, EPS)[0],
        "by definition": lambda *args: by_definition(*args, groups),
    }

    def compiled(norm):
        unit = lambda x, scale, bias: activate(norm(max_pool(x, (2, 2)), scale, bias)).astype(jnp.bfloat16)

        def both(x, scale, bias):  # a convolution before it takes its gradient in bfloat16
            y, pull = jax.vjp(unit, x, scale, bias)
            to_x, *others = pull(y)
            return y, to_x.astype(jnp.bfloat16), others

        return jax.jit(both).lower(x, scale, bias).compile(backend.compiler_options())

    programs, seconds = {name: compiled(norm) for name, norm in norms.items()}, {name: [] for name in norms}
    for i in range(rounds + 1):
        for name in list(norms)[:: 1 if i % 2 == 0 else -1]:
            start = time.perf_counter()
            jax.block_until_ready(programs[name](x, scale, bias))
            if i:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    for name, times in seconds.items():
        print(f"{name}: {1e3 * statistics.median(times):.1f} ms ({1e3 * min(times):.1f} to {1e3 * max(times):.1f})")
    ratios = [a / b for a, b in zip(seconds["by definition"], seconds["batch_norm.py"], strict=True)]
    print(f"by definition / batch_norm.py: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
