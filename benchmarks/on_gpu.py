"""Everything that the first GPU is to show, in one command of at most nine minutes.

    python -m benchmarks.on_gpu --data cifar-10-batches-py --out gpu        # on the machine with the GPU
    python -m benchmarks.on_gpu --dry-run --out tiny                        # the same steps, tiny, on any machine

Needs jax, flax, optax, chex, numpy, scipy, scikit-learn, pillow, safetensors and, to compare with, torch. The other
packages that the package and its tests import are small; without a network, carry them along:

    pip download --no-deps --dest wheels jaxtyping wadler-lindig click rich pygments markdown-it-py mdurl jinja2 \
        markupsafe pytest pluggy iniconfig packaging hypothesis sortedcontainers attrs
    python -m benchmarks.on_gpu --wheels wheels --data cifar-10-batches-py --out gpu

Each step is a process of its own with a limit, so that one that fails or hangs costs no other. The folder `--out` gets
`summary.md` with a section per step, `records.tar.gz` with the records, `bench.json` and a profile; at most 8 files.
Answer: it was never run on a GPU.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ("final", "airbench94", "airbench94_muon")
TESTS = ("tests/ops", "tests/models", "tests/reference", "tests/test_train.py", "tests/test_evaluate.py",
         "tests/test_optim.py", "tests/test_averaging.py", "tests/test_augment.py")  # fmt: skip
# XLA captures kernels between waits of the host as one graph. A loop that never waits can be captured whole.
COMMANDS = "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION"
XLA_OPTIONS = {
    "default": "",
    "with WHILE": f"--xla_gpu_enable_command_buffer={COMMANDS},WHILE",
    "no command buffers": "--xla_gpu_enable_command_buffer=",
}


class Step(NamedTuple):
    """A section of the summary."""

    title: str
    command: tuple[str, ...]  # arguments of Python
    seconds: int  # limit
    environment: dict[str, str] = {}
    markdown: bool = False  # what it prints; else plain text


def steps_of(out: Path, data: str, tiny: bool) -> list[Step]:
    """The steps, the most wanted first."""
    small = ("--width", "2", "--epochs", "3", "--limit-train", "640") if tiny else ()
    seeds, runs = "1" if tiny else "5", str(out / "runs")
    me, run = ("-m", "benchmarks.on_gpu"), ("-m", "experiments", "run")
    timed = ("quickstart",) if tiny else RECIPES[:2]
    recipes = ("quickstart",) if tiny else RECIPES
    cache = {"JAX_COMPILATION_CACHE_DIR": str(out / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    bench = ("-m", "experiments", "bench", *timed, "--data", data, "--json", str(out / "bench.json"), "--rounds", "5")
    bench += ("--width", "2", "--limit-train", "640") if tiny else ("--against", "torch")
    tests = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=")
    return [
        Step("Machine", ("-m", "fastcifar_jax", "doctor"), 60),
        Step("Whole runs", (*run, *recipes, "--seeds", seeds, "--data", data, "--out", runs, *small), 180),
        Step("Table", (*me, "--table", runs), 30, markdown=True),
        Step("Whole steps beside PyTorch", bench, 120),
        Step("Compile times, cold", (*me, "--compile", data, *recipes), 60, cache),
        Step("Compile times, cached", (*me, "--compile", data, *recipes), 30, cache),
        *(
            Step(f"Seconds per epoch, {name}", (*me, "--epochs", data, *timed), 30, {"XLA_FLAGS": flags})
            for name, flags in XLA_OPTIONS.items()
        ),
        Step("Profile of an epoch", (*me, "--epochs", data, timed[-1], "--profile", str(out / "profile")), 30),
        Step("Tests", (*tests, *(("tests/test_averaging.py",) if tiny else TESTS)), 90),
    ]


def run_step(step: Step, left: float) -> str:
    """The step's section of the summary, how it ended and its last lines, if `left` seconds are enough to begin."""
    if left < 1:
        return f"## {step.title}\n\nleft out: the time is over\n"
    limit = min(step.seconds, left)
    began, environment = time.perf_counter(), {**os.environ, **step.environment}
    command = [sys.executable, *step.command]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, timeout=limit, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        text, end = done.stdout, f"status {done.returncode}"
    except subprocess.TimeoutExpired as error:
        text, end = (error.stdout or b"").decode(errors="replace"), f"stopped at its limit of {limit:.0f} s"
    body = text if step.markdown else f"```text\n{text[-6000:].strip()}\n```"
    return f"## {step.title}\n\n{end}, {time.perf_counter() - began:.0f} s\n\n{body}\n"


def print_table(runs: Path) -> None:
    """Published and measured figures of the records, as Markdown."""
    from fastcifar_jax.report import tables
    from fastcifar_jax.runs import experiments, records

    declared = experiments.find_experiments(experiments.default_folder())
    arms = tables.arms_of(list(records.gather([runs]).values()), declared)
    print(tables.markdown(tables.ladder(arms, declared)))


def print_seconds(data: str, names: list[str], epochs: bool, profile: str | None) -> None:
    """Seconds of compiling recipes, or of three epochs of each, with a profile of the last one."""
    import jax

    from fastcifar_jax.data.load import load_data
    from fastcifar_jax.ops import backend
    from fastcifar_jax.recipe import resolve_dtype
    from fastcifar_jax.runs import experiments
    from fastcifar_jax.train import compile_run, train_epochs

    backend.configure()
    jax.devices()  # before the data
    dataset, info = load_data(data)
    dataset = jax.device_put(dataset)
    for experiment in experiments.resolve(names, experiments.default_folder()):
        recipe, count = resolve_dtype(experiment.recipe), len(info.classes)
        compiled = compile_run(recipe, count, dataset)
        print(f"{recipe.name}: {compiled.seconds:.2f} s for compiling and warming up")
        run = train_epochs(recipe, count, jax.random.key(0), dataset, compiled=compiled) if epochs else iter(())
        for snapshot, _ in zip(run, range(3), strict=False):
            print(f"  epoch {len(snapshot.epochs)}: {snapshot.epochs[-1].train_seconds:.4f} s")
        if profile:
            with jax.profiler.trace(profile):
                next(run)


def pack(out: Path, name: str, folder: Path) -> None:
    """Replaces a folder by an archive, since few files come back from some machines."""
    if folder.is_dir():
        with tarfile.open(out / f"{name}.tar.gz", "w:gz") as archive:
            archive.add(folder, name)
        shutil.rmtree(folder)


def main() -> None:
    """Runs all steps, or what one of them runs in its process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the answers")
    parser.add_argument("--data", default="cifar10", help="CIFAR-10, as for `run`")
    parser.add_argument("--wheels", type=Path, help="folder of packages to install first, without a network")
    parser.add_argument("--minutes", type=float, default=9, help="for all steps on a GPU")
    parser.add_argument("--dry-run", action="store_true", help="a tiny network on digits, on any device")
    for inner in ("--table", "--compile", "--epochs", "--profile"):
        parser.add_argument(inner, help=argparse.SUPPRESS)
    parser.add_argument("names", nargs="*", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.table:
        return print_table(Path(asked.table))
    if asked.compile or asked.epochs:
        return print_seconds(asked.compile or asked.epochs, asked.names, bool(asked.epochs), asked.profile)
    if not asked.out:
        parser.error("give --out, a folder for the answers")
    asked.out.mkdir(parents=True, exist_ok=True)
    out = asked.out.resolve()
    if asked.wheels:
        wheels = [str(path) for path in sorted(asked.wheels.glob("*.whl"))]
        subprocess.run([sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", *wheels], check=True)
    sections, end = [], time.perf_counter() + 60 * (60 if asked.dry_run else asked.minutes)
    for step in steps_of(out, "digits" if asked.dry_run else asked.data, asked.dry_run):
        step = step._replace(seconds=600) if asked.dry_run else step  # the limits are for a GPU
        sections.append(run_step(step, end - time.perf_counter()))
        print(sections[-1].split("\n\n")[0], sections[-1].split("\n\n")[1], flush=True)
        (out / "summary.md").write_text("\n".join(sections))  # after each step: a machine may be taken back
    pack(out, "records", out / "runs")
    pack(out, "profile", out / "profile")
    shutil.rmtree(out / "cache", ignore_errors=True)


if __name__ == "__main__":
    main()
