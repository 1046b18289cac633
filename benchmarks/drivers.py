"""Is `lax.scan` over the steps of an epoch as fast as a Python loop over a compiled step?

    python benchmarks/drivers.py --data digits --width 16
    FASTCIFAR_CONV=lax python benchmarks/drivers.py --data digits --width 16

One process, epochs of both drivers in turn (A B B A ...), the median of at least 5 each and their ratio.

Answer (2 cores of an Intel Xeon with AMX, jax 0.10.2, oneDNN convolutions, width 16): yes, scan / python 1.00 (0.98 to
1.20). With FASTCIFAR_CONV=lax it is not: XLA:CPU runs lax's weight gradients many times slower inside a loop (jax issue
12868), so "python" is still the default on CPUs.
"""

import statistics
import sys
import time
from pathlib import Path

import click
import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiments.bag_of_tricks import final  # noqa: E402
from fastcifar_jax.data.load import load_data  # noqa: E402
from fastcifar_jax.ops import conv  # noqa: E402
from fastcifar_jax.recipe import change  # noqa: E402
from fastcifar_jax.train import compile_programs  # noqa: E402
from fastcifar_jax.tunable import tunable  # noqa: E402


@click.command()
@click.option("--data", default="digits", show_default=True)
@click.option("--limit-train", type=int, default=1024, show_default=True)
@click.option("--width", type=int, default=16, show_default=True)
@click.option("--dtype", default="mixed", show_default=True)
@click.option("--rounds", type=click.IntRange(5), default=6, show_default=True)
def main(data, limit_train, width, dtype, rounds):
    conv.configure_cpu()
    recipe = change(final, (), None, width, dtype)
    dataset, info = load_data(data, limit_train=limit_train)
    dataset = jax.device_put(dataset)
    runs, seconds = {}, {"python": [], "scan": []}
    for driver in seconds:
        start = time.perf_counter()
        programs = compile_programs(recipe, len(info.classes), dataset, driver)
        print(f"{driver}: {time.perf_counter() - start:.1f} s to compile")
        runs[driver] = [programs, programs.init(tunable(recipe), jax.random.key(0), dataset)]

    def epoch(driver, i):
        programs, state = runs[driver]
        plan = programs.plan(jax.random.key(1), np.int32(i), dataset)
        start = time.perf_counter()
        state, _ = jax.block_until_ready(
            programs.train_epoch(tunable(recipe), state, dataset, plan, 1, programs.steps_per_epoch, None)
        )
        runs[driver][1] = state
        return time.perf_counter() - start

    for i in range(rounds + 1):
        for driver in list(seconds)[:: 1 if i % 2 == 0 else -1]:
            taken = epoch(driver, i)
            if i:  # the first round warms up
                seconds[driver].append(taken)
    images = runs["python"][0].steps_per_epoch * recipe.batch_size
    for driver, times in seconds.items():
        print(f"{driver}: {images / statistics.median(times):,.0f} images/s")
    ratios = [a / b for a, b in zip(seconds["python"], seconds["scan"], strict=True)]
    print(
        f"scan / python: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}), "
        f"conv {conv.conv_backend()[0]}"
    )


if __name__ == "__main__":
    main()
