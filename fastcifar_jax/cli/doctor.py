"""The command `doctor`: what runs use on this machine, and what keeps them from using more."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping

import click

from fastcifar_jax.cli import console as view
from fastcifar_jax.cli.options import usage_errors
from fastcifar_jax.ops import backend, devices, known_values
from fastcifar_jax.runs import provenance

CUDNN = ("nvidia-cudnn-cu13", "nvidia-cudnn-cu12")
# Besides those of JAX and XLA; LD_LIBRARY_PATH can replace the CUDA libraries that JAX was installed with.
VARIABLES = ("CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH")


@click.command()
def doctor() -> None:
    """Shows the device, the versions and the settings that runs have on this machine, and the reasons."""
    console = view.make_console()
    with usage_errors():
        started = jax_lines()
    for label, text in (*started.items(), *machine_lines(), *gpu_lines()):
        console.print(f"{label:>12}: {text}")
    if "loop" in started:
        console.print(f"{'values':>12}: {values_text(known_values.wrong_values())}")


def jax_lines() -> dict[str, str]:
    """What JAX computes on, and how.

    Raises:
      ValueError: `FASTCIFAR_CONV` has a wrong value.
    """
    try:
        device = view.device_text(provenance.device())
    except RuntimeError as error:  # a plugin is installed that cannot open its device
        return {"device": f"JAX does not start: {' '.join(str(error).split())}"}
    return {
        "device": device,
        "convolutions": ": ".join(backend.conv_backend()),
        "loop": f"a call runs one {backend.step_loop()} of training steps",
        "dtype": ": ".join(backend.default_dtype()),
    }


def machine_lines(environment: Mapping[str, str] = os.environ) -> Iterator[tuple[str, str]]:
    """What does not depend on the device."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    yield "memory", f"{memory / 2**30:.1f} GiB" if memory else "unknown"
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    yield "cores", cores_text(os.cpu_count() or 1, usable, devices.cpu_quota())
    yield "versions", ", ".join(f"{package} {version}" for package, version in provenance.versions().items())
    yield "data", environment.get("FASTCIFAR_DATA") or "cifar10 (FASTCIFAR_DATA is not set)"
    names = sorted(name for name in environment if name.startswith(("JAX_", "XLA_")) or name in VARIABLES)
    settings = " ".join(f"{name}={environment[name]}" for name in names)
    yield "environment", settings or "no JAX_* or XLA_* variable is set"


def gpu_lines() -> Iterator[tuple[str, str]]:
    """The GPU, what JAX needs for it, and why JAX does not use it."""
    gpus, packages = devices.find_gpus(), devices.package_versions()
    plugins = ", ".join(f"{name} {version}" for name, version in packages.items() if "cuda" in name)
    yield "GPU", gpu_text(gpus)
    yield "CUDA plugin", plugins or "not installed"
    if gpus:
        for problem in devices.gpu_problems(gpus[0], packages) or devices.start_problems():
            yield "problem", problem.reason
            yield "repair", problem.repair
        yield "GPU memory", gpu_memory_text()
    if libraries := devices.loaded_libraries("libcudnn.so"):
        versions = ", ".join(f"{name} {version}" for name, version in devices.package_versions(CUDNN).items())
        yield "cuDNN", f"{libraries[0]}, {versions or 'not from a Python package'}"
    else:
        yield "cuDNN", "not loaded"


def gpu_text(gpus: list[devices.Gpu]) -> str:
    """The GPUs of this machine; all have the driver of the first."""
    if not gpus:
        return "no NVIDIA GPU: nvidia-smi lists none, and there are no files /dev/nvidia*"
    names = ", ".join(f"{count} x {name}" for name, count in Counter(gpu.name for gpu in gpus).items())
    return f"{names}; driver {gpus[0].driver or 'unknown'}, compute capability {gpus[0].capability or 'unknown'}"


def gpu_memory_text(environment: Mapping[str, str] = os.environ) -> str:
    """How JAX allocates the memory of a GPU (https://docs.jax.dev/en/latest/gpu_memory_allocation.html)."""
    for name, values in {
        "XLA_PYTHON_CLIENT_PREALLOCATE": ("false", "False", "0"),
        "XLA_PYTHON_CLIENT_ALLOCATOR": ("platform",),
    }.items():
        if (value := environment.get(name)) in values:
            return f"allocated as needed ({name}={value})"
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        if value := environment.get(name):
            return f"JAX takes a fraction of {value} when it starts ({name})"
    return "JAX takes 75 % when it starts (its default); XLA_CLIENT_MEM_FRACTION changes that"


def cores_text(counted: int, usable: int | None, quota: float | None) -> str:
    """The cores of the machine, and the limits of this process where it has fewer."""
    limits = []
    if usable is not None and usable != counted:
        limits.append(f"the affinity of this process allows {usable}")
    if quota is not None and quota < counted:
        limits.append(f"its cgroup grants the time of {quota:g}")
    return f"{counted} counted" + (f", but {' and '.join(limits)}" if limits else "")


def values_text(wrong: Mapping[str, str]) -> str:
    """The outcome of `known_values.wrong_values`."""
    count = len(known_values.VALUES)
    if not wrong:
        return f"{count} of {count} values right, jitted and not"
    faults = "; ".join(f"{name} {fault}" for name, fault in wrong.items())
    return f"{count - len(wrong)} of {count} values right; {faults}; do not train here (compare jax issue 40633)"
