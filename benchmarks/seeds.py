"""What do `map` and `vmap` over seeds cost beside one seed after another, and from which width down do they pay?

    python benchmarks/seeds.py --width 4
    python benchmarks/seeds.py --width 16
    python benchmarks/seeds.py --width 1
    FASTCIFAR_CONV=lax python benchmarks/seeds.py --width 4 --limit-train 512 --rounds 5

One process, an epoch of all seeds with each strategy in turn (A B C C B A ...), the median of at least 5 each and of
the ratios to the loop's epoch of the same round.

Answer (2 cores of an Intel Xeon with AMX, one of them also busy with another job; jax 0.10.2, float32, 4 seeds of
`final` on digits; the time of an epoch of all seeds as a multiple of the loop's, median and range):

    convolutions  driver  width  n  map                     vmap
    oneDNN        scan       16  6   1.00 (0.97 to 1.02)    1.31 (1.26 to 1.38)
    oneDNN        scan        4  6   1.00 (0.97 to 1.01)    1.36 (1.34 to 1.43)
    oneDNN        scan        1  6   1.00 (0.99 to 1.07)    1.24 (1.22 to 1.34)
    lax           python      4  5  11.57 (11.36 to 12.00)  2.61 (2.49 to 2.70)

On this CPU neither pays at any width: `map` is the loop, and with lax what XLA does to weight gradients in a loop (jax
issue 12868) comes on top; `vmap` calls oneDNN once a seed anyway, and makes grouped convolutions of lax's. No GPU was
measured.
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
from fastcifar_jax.parallel.hosts import place  # noqa: E402
from fastcifar_jax.parallel.mesh import (
    compile_for_mesh,  # noqa: E402
    make_mesh,  # noqa: E402
    raw_keys,  # noqa: E402
    spread_over,  # noqa: E402
)
from fastcifar_jax.recipe import change  # noqa: E402
from fastcifar_jax.train import compile_programs  # noqa: E402
from fastcifar_jax.tunable import tunable  # noqa: E402


@click.command()
@click.option("--data", default="digits", show_default=True)
@click.option("--limit-train", type=int, default=1024, show_default=True)
@click.option("--width", type=int, default=4, show_default=True)
@click.option("--dtype", default="float32", show_default=True)
@click.option("--seeds", "count", type=click.IntRange(2), default=4, show_default=True)
@click.option("--driver", type=click.Choice(("python", "scan")), help="Default by platform.")
@click.option("--rounds", type=click.IntRange(5), default=6, show_default=True)
def main(data, limit_train, width, dtype, count, driver, rounds):
    conv.configure_cpu()
    driver = driver or conv.default_driver()
    recipe = change(final, (), None, width, dtype)
    dataset, info = load_data(data, limit_train=limit_train)
    dataset = jax.device_put(dataset)
    mesh = make_mesh(1, 1)
    values, steps = tunable(recipe), limit_train // recipe.batch_size

    def loop():
        programs = compile_programs(recipe, len(info.classes), dataset, driver)
        keys = [jax.random.key(seed) for seed in range(count)]
        states = [programs.init(values, key, dataset) for key in keys]

        def epoch(i):
            for seed, key in enumerate(keys):
                plan = programs.plan(key, np.int32(i), dataset)
                states[seed], _ = jax.block_until_ready(
                    programs.train_epoch(values, states[seed], dataset, plan, 1, steps, None)
                )

        return epoch

    def together(strategy):
        everywhere = place(dataset, spread_over(mesh))
        programs = compile_for_mesh(recipe, len(info.classes), everywhere, driver, strategy, mesh, count)
        keys = raw_keys(range(count), mesh)
        state = programs.init(values, keys, everywhere)

        def epoch(i):
            nonlocal state
            plan = programs.plan(keys, np.int32(i), everywhere)
            state, _ = jax.block_until_ready(programs.train_epoch(values, state, everywhere, plan, 1, steps, None))

        return epoch

    epochs = {}
    for strategy in ("loop", "map", "vmap"):
        start = time.perf_counter()
        epochs[strategy] = loop() if strategy == "loop" else together(strategy)
        print(f"{strategy}: {time.perf_counter() - start:.1f} s to compile and initialise")
    seconds = {strategy: [] for strategy in epochs}
    for i in range(rounds + 1):
        for strategy in list(epochs)[:: 1 if i % 2 == 0 else -1]:
            start = time.perf_counter()
            epochs[strategy](i + 1)
            if i:  # the first round warms up
                seconds[strategy].append(time.perf_counter() - start)
    images = count * steps * recipe.batch_size
    print(f"width {width}, {count} seeds, {driver}, {dtype}, conv {conv.conv_backend()[0]}, n = {rounds}")
    for strategy, times in seconds.items():
        ratios = [a / b for a, b in zip(times, seconds["loop"], strict=True)]
        print(
            f"{strategy}: {images / statistics.median(times):,.0f} images/s, {statistics.median(ratios):.2f} of the "
            f"loop's time ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
