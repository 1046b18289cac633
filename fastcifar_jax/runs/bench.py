"""Images per second of whole training steps of a recipe in JAX, and in PyTorch beside it.

Each contender is a process of its own, which takes a few steps when asked. The rounds go A B C, C B A, A B C ..., so
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

from fastcifar_jax.ops import backend
from fastcifar_jax.recipe import Recipe
from fastcifar_jax.runs import provenance

MIN_ROUNDS = 5
PASSES = ("forward", "input", "weight")  # of a convolution: the output, and the gradients of its operands

Say = Callable[[str], None]


class Contender(NamedTuple):
    """A framework with its settings; `task` goes to `bench_worker`."""

    name: str
    task: dict[str, Any]


class BenchError(RuntimeError):
    """A contender that could not be run; the message holds the end of its output."""


def contenders(
    task: dict[str, Any], dtypes: tuple[str, ...], against_torch: bool, half: str = "bfloat16"
) -> list[Contender]:
    """JAX in each compute dtype, and PyTorch in float32 and the half precision `half`, eager and compiled.

    PyTorch takes part with its defaults, and "tuned", with the memory settings that JAX has on CPUs.
    """
    found = [Contender(f"jax {dtype}", {**task, "kind": "jax", "dtype": dtype}) for dtype in dtypes]
    if against_torch:
        for dtype, compiled, tuned in (
            (half, False, True),
            (half, False, False),
            (half, True, True),
            ("float32", False, False),
            ("float32", True, True),
        ):
            name = f"torch {dtype} {'compiled' if compiled else 'eager'}{' tuned' * tuned}"
            settings = {"kind": "torch", "dtype": dtype, "compiled": compiled, "tuned": tuned}
            found.append(Contender(name, {**task, **settings}))
    return found


def measure(
    found: list[Contender], batch_size: int, rounds: int, say: Say
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Runs the rounds.

    Args:
      found: who takes part.
      batch_size: images per step.
      rounds: turns of each contender.
      say: called with each line of progress.

    Returns:
      For each contender its versions and settings, `seconds` per step in each turn, `images_per_second` (median) and
      `peak_bytes`; and the contenders that could not be run, with the reason.
    """
    workers, results, failed = {}, {}, {}
    with contextlib.ExitStack() as stack:
        for name, task in found:
            say(f"{name}: compiling and warming up")
            ask = stack.enter_context(_started())
            try:
                results[name] = {**ask(json.dumps(task)), "seconds": []}
                workers[name] = ask
            except BenchError as error:
                failed[name] = str(error)
                say(f"{name}: left out: {error}")
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


def fastest(results: dict[str, dict[str, Any]], framework: str) -> str | None:
    """The contender of a framework with the most images per second."""
    names = [name for name in results if name.startswith(framework)]
    return max(names, key=lambda name: results[name]["images_per_second"], default=None)


def ratio(results: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """The fastest JAX over the fastest PyTorch, by medians: median, least and largest of the rounds' ratios."""
    ours, theirs = fastest(results, "jax"), fastest(results, "torch")
    if ours is None or theirs is None:
        return None
    ratios = [b / a for a, b in zip(results[ours]["seconds"], results[theirs]["seconds"], strict=True)]
    spread = {"median": statistics.median(ratios), "least": min(ratios), "largest": max(ratios)}
    return {"jax": ours, "torch": theirs, **spread}


def run_bench(
    task: dict[str, Any],
    recipe: Recipe,
    macs: int,
    dtypes: tuple[str, ...],
    against_torch: bool,
    rounds: int,
    say: Say,
) -> dict[str, Any]:
    """The whole benchmark of one recipe as a JSON object; see the functions above for its parts.

    Args:
      task: experiment, path of its file, experiments folder, data, limit_train, width and assignments.
      recipe: the same recipe.
      macs: multiply-accumulates of one image's forward pass.
      dtypes: compute dtypes of JAX.
      against_torch: whether PyTorch takes part.
      rounds: at least `MIN_ROUNDS`.
      say: called with each line of progress.

    Raises:
      BenchError: no JAX contender could be run.
    """
    half = "float16" if backend.default_dtype()[0] == "float16" else "bfloat16"
    results, failed = measure(contenders(task, dtypes, against_torch, half), recipe.batch_size, rounds, say)
    best = fastest(results, "jax")
    if best is None:
        raise BenchError(f"no JAX contender could be run: {failed}")
    say("layer by layer")
    with _started() as ask:
        layers = ask(json.dumps({**task, "kind": "layers", "dtype": best.removeprefix("jax ")}))
    # Forward and two gradients are three products of the same size.
    floor = recipe.batch_size * 6 * macs / (layers["ceiling"] * 1e9)
    return {
        "experiment": task["experiment"],
        "recipe_repr": repr(recipe),
        "width": task["width"],
        "batch_size": recipe.batch_size,
        "rounds": rounds,
        "device": provenance.device(),
        "versions": provenance.versions(),
        "contenders": results,
        "failed": failed,
        "ratio": ratio(results),
        **layers,
        "share_of_ceiling": floor / statistics.median(results[best]["seconds"]),
    }


@contextlib.contextmanager
def _started() -> Iterator[Callable[[str], dict[str, Any]]]:
    """A worker; yields a function that sends it a line and returns its answer."""
    command = [sys.executable, "-m", "fastcifar_jax.runs.bench_worker"]
    with (
        tempfile.TemporaryFile("w+") as errors,  # not a pipe, which would block a worker that writes much
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
