"""Images per second of whole training steps, interleaved with PyTorch's in one run.

Every contender is a process of its own that takes a few steps when told to; the rounds go A B C, C B A, A B C ..., so
that a machine that slows down slows all of them, and speeds are compared as ratios within a round.
"""

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple, cast

from rich.console import Console

from fastcifar_jax.cli import console as report
from fastcifar_jax.recipe import Recipe
from fastcifar_jax.runs import provenance

MIN_ROUNDS = 5


class Contender(NamedTuple):
    """A framework with its settings; `task` goes to `bench_worker`."""

    name: str
    task: dict[str, Any]


class BenchError(RuntimeError):
    """A contender that could not be run; the message holds the end of what it said."""


def contenders(task: dict[str, Any], dtypes: tuple[str, ...], against_torch: bool) -> list[Contender]:
    """JAX in each compute dtype, and PyTorch in float32 and bfloat16, eager and compiled.

    PyTorch takes part as it comes, and once more with the memory settings that JAX gets here.
    """
    found = [Contender(f"jax {dtype}", {**task, "kind": "jax", "dtype": dtype}) for dtype in dtypes]
    if against_torch:
        for dtype, compiled, tuned in (
            ("bfloat16", False, True),
            ("bfloat16", False, False),
            ("bfloat16", True, True),
            ("float32", False, False),
            ("float32", True, True),
        ):
            name = f"torch {dtype} {'compiled' if compiled else 'eager'}{' tuned' * tuned}"
            settings = {"torch_dtype": dtype, "compiled": compiled, "tuned": tuned}
            found.append(Contender(name, {**task, "kind": "torch", "dtype": "float32", **settings}))
    return found


def measure(
    found: list[Contender], batch_size: int, rounds: int, console: Console
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Runs the rounds.

    Args:
      found: who takes part.
      batch_size: images a step.
      rounds: turns of each contender.
      console: tells what is going on.

    Returns:
      For each contender what it knows of itself, `seconds` a step in each turn, `images_per_second` (median) and
      `peak_bytes`; and the contenders that could not be run, with the reason.
    """
    workers, results, failed = {}, {}, {}
    with contextlib.ExitStack() as stack:
        for name, task in found:
            console.print(f"{name}: compiling and warming up", soft_wrap=True)
            ask = stack.enter_context(_started())
            try:
                results[name] = {**ask(json.dumps(task)), "seconds": []}
                workers[name] = ask
            except BenchError as error:
                failed[name] = str(error)
                console.print(f"{name}: left out: {error}", soft_wrap=True)
        for i in range(rounds):
            for name in list(workers)[:: 1 if i % 2 == 0 else -1]:
                try:
                    answer = workers[name]("step")
                except BenchError as error:
                    failed[name] = str(error)
                    del workers[name], results[name]
                    continue
                results[name]["seconds"].append(answer["seconds"])
                results[name]["peak_bytes"] = answer["peak_bytes"]
    for result in results.values():
        result["images_per_second"] = batch_size / statistics.median(result["seconds"])
    return results, failed


def ratio(results: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """The fastest JAX over the fastest PyTorch, by medians: median, least and largest of the rounds' ratios."""
    fastest = {}
    for framework in ("jax", "torch"):
        names = [name for name in results if name.startswith(framework)]
        if not names:
            return None
        fastest[framework] = max(names, key=lambda name: results[name]["images_per_second"])
    ours, theirs = (results[fastest[framework]]["seconds"] for framework in ("jax", "torch"))
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    return {**fastest, "median": statistics.median(ratios), "least": min(ratios), "largest": max(ratios)}


def layers(task: dict[str, Any], dtype: str) -> dict[str, Any]:
    """GFLOP/s of each convolution and pass, and of one large product; see `bench_worker.layer_rates`."""
    task = {**task, "kind": "layers", "dtype": dtype}
    with _started() as ask:
        return ask(json.dumps(task))


def run(
    task: dict[str, Any],
    recipe: Recipe,
    macs: int,
    dtypes: tuple[str, ...],
    against_torch: bool,
    rounds: int,
    console: Console,
) -> dict[str, Any]:
    """The whole benchmark of one recipe as a JSON object; see the functions above for its parts.

    Args:
      task: experiment, path of its file, experiments folder, data, limit_train, width and assignments.
      recipe: the same recipe.
      macs: multiply-accumulates of one image's forward pass.
      dtypes: compute dtypes of JAX.
      against_torch: whether PyTorch takes part.
      rounds: at least `MIN_ROUNDS`.
      console: tells what is going on.
    """
    batch_size = recipe.batch_size
    results, failed = measure(contenders(task, dtypes, against_torch), batch_size, rounds, console)
    ours = [name for name in results if name.startswith("jax")]
    if not ours:
        raise BenchError(f"no JAX contender could be run: {failed}")
    best = max(ours, key=lambda name: results[name]["images_per_second"])
    console.print("layer by layer", soft_wrap=True)
    by_layer = layers(task, best.removeprefix("jax "))
    # Forward and two gradients are three products of the same size.
    floor = batch_size * 6 * macs / (by_layer["ceiling"] * 1e9)
    return {
        "experiment": task["experiment"],
        "recipe_repr": repr(recipe),
        "width": task["width"],
        "batch_size": batch_size,
        "rounds": rounds,
        "device": provenance.device(),
        "versions": provenance.versions(),
        "contenders": results,
        "failed": failed,
        "ratio": ratio(results),
        **by_layer,
        "share_of_ceiling": floor / statistics.median(results[best]["seconds"]),
    }


def show(found: dict[str, Any], console: Console) -> None:
    """The benchmark as tables."""
    title = f"{found['experiment']}, batch {found['batch_size']}, {report.device_text(found['device'])}"
    console.print(f"{title}: median of {found['rounds']} interleaved steps", soft_wrap=True)
    columns = ("images/s", "s a step", "spread", "compile s", "peak GB")
    table = report.make_table("", *((name, "right") for name in columns))
    for name, result in sorted(found["contenders"].items(), key=lambda item: -item[1]["images_per_second"]):
        seconds = result["seconds"]
        table.add_row(
            name, f"{result['images_per_second']:,.0f}", f"{statistics.median(seconds):.3f}",
            f"{min(seconds):.3f}-{max(seconds):.3f}", f"{result['compile_seconds']:.1f}",
            f"{result['peak_bytes'] / 1e9:.1f}",
        )  # fmt: skip
    console.print(table)
    if found["ratio"]:
        r = found["ratio"]
        console.print(
            f"{r['jax']} / {r['torch']}: {r['median']:.2f} ({r['least']:.2f} to {r['largest']:.2f})", soft_wrap=True
        )
    table = report.make_table("convolution", "shape", *((f"{name} GFLOP/s", "right") for name in PASSES))
    for name, layer in found["layers"].items():
        table.add_row(name, layer["shape"], *(f"{layer[pass_]:,.0f}" for pass_ in PASSES))
    console.print(table)
    console.print(
        f"one large product: {found['ceiling']:,.0f} GFLOP/s; the step reaches {found['share_of_ceiling']:.0%} of the "
        "speed that its convolutions would have at that rate",
        soft_wrap=True,
    )


PASSES = ("forward", "input", "weight")


@contextlib.contextmanager
def _started() -> Iterator[Callable[[str], dict[str, Any]]]:
    """A worker; yields a function that sends it a line and returns its answer."""
    command = [sys.executable, "-m", "fastcifar_jax.runs.bench_worker"]
    with (
        tempfile.TemporaryFile("w+") as errors,  # not a pipe: a talkative worker would wait for a reader
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True) as worker,
    ):
        commands, answers = cast(IO[str], worker.stdin), cast(IO[str], worker.stdout)

        def ask(line):
            with contextlib.suppress(BrokenPipeError):
                commands.write(line + "\n")
                commands.flush()
            answer = answers.readline()
            if answer:
                return json.loads(answer)
            status = worker.wait()
            errors.seek(0)
            last = (errors.read().strip().splitlines() or ["no message"])[-1]
            raise BenchError(f"ended with status {status}: {last[:300]}")

        try:
            yield ask
        finally:
            worker.kill()
            with contextlib.suppress(BrokenPipeError):
                commands.close()
