"""What depends on the platform: convolutions, the default dtype, compiler options, memory, kept programs.

oneDNN's convolution is not a public interface of jaxlib: another jaxlib may lack it, and on another processor it may
end the process or compute wrong numbers. So it is used only where `onednn_check` succeeded, in a process of its own.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

import jax
from jax import lax
from jaxtyping import Array

ConvBackend = Literal["lax", "onednn"]
StepLoop = Literal["step", "block", "epoch"]  # training steps that one call runs

CHECK_SECONDS = 300  # a check that takes longer hangs; on an idle machine it takes 10
COMPILE_SECONDS = 0.1  # programs that compile faster are not kept
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"  # in XLA_FLAGS, and so in the provenance of runs
_GAP = 2**30  # bytes of address space for small allocations
# The name of the kernel in a line of ONEDNN_VERBOSE. Those called gemm start parallel work inside parallel work, for
# which XLA's thread pool waits forever; those called ref are a thousand times slower.
_KERNEL = re.compile(r"^onednn_verbose,.*,convolution,([^,]*),", re.MULTILINE)


def conv_backend() -> tuple[ConvBackend, str]:
    """What computes convolutions here, and the reason in a few words.

    `FASTCIFAR_CONV=lax|onednn` forces one, without a check. Under a mesh of several devices (`jax.set_mesh`) it is
    always lax, because XLA cannot partition the call of oneDNN.

    Raises:
      ValueError: `FASTCIFAR_CONV` has another value.
    """
    forced = os.environ.get("FASTCIFAR_CONV")
    if forced and forced not in ("lax", "onednn"):
        raise ValueError(f"FASTCIFAR_CONV is {forced!r}; set it to lax or onednn, or unset it")
    if (devices := jax.sharding.get_abstract_mesh().size) > 1:
        return "lax", f"XLA cannot partition the call of oneDNN over a mesh of {devices} devices"
    if forced:
        return cast(ConvBackend, forced), f"forced by FASTCIFAR_CONV={forced}"
    if jax.default_backend() != "cpu":
        return "lax", f"the default backend is {jax.default_backend()}"
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return "lax", f"no oneDNN in jaxlib for {platform.system()} {platform.machine()}"
    works, reason = check_onednn()
    return "onednn" if works else "lax", reason


@functools.cache
def check_onednn() -> tuple[bool, str]:
    """Whether oneDNN's convolution works here, and why it is or is not used.

    The check takes seconds. Its answer is kept in the user's cache folder, per jaxlib version, processor and source of
    this folder; without a writable folder every process checks again.
    """
    file = _cache_file()
    try:
        known = json.loads(file.read_text())
        return bool(known["works"]), str(known["reason"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    works, reason = _run_check()
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(json.dumps({"works": works, "reason": reason}))
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)
    return works, reason


def _run_check() -> tuple[bool, str]:
    """Runs `onednn_check` in another process; anything but its success means no."""
    command = [sys.executable, "-m", "fastcifar_jax.ops.onednn_check"]
    environment = {**os.environ, "FASTCIFAR_CONV": "onednn", "JAX_PLATFORMS": "cpu", "ONEDNN_VERBOSE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CHECK_SECONDS, env=environment)
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, f"the check of oneDNN did not end: {type(error).__name__}; delete {_cache_file()} to try again"
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1][:200]
        return False, f"the check of oneDNN ended with status {done.returncode}: {last}"
    slow = sorted({name for name in _KERNEL.findall(done.stdout) if name.startswith(("gemm", "ref"))})
    if slow:
        return False, f"oneDNN has no fast convolution for this processor: it uses {', '.join(slow)}"
    return True, f"oneDNN in jaxlib {importlib.metadata.version('jaxlib')} agreed with lax in a check"


def _cache_file() -> Path:
    sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    processor = "".join(sorted({line for line in _cpu_info().splitlines() if line.startswith(("model name", "flags"))}))
    settings = os.environ.get("XLA_FLAGS", "") + os.environ.get("ONEDNN_MAX_CPU_ISA", "")
    text = "\n".join([importlib.metadata.version("jaxlib"), processor, settings, sys.version])
    name = hashlib.sha256(text.encode() + sources).hexdigest()[:16]
    return _cache_folder() / f"onednn-{name}.json"


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastcifar_jax"


def _cpu_info() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux
        return ""


def on_platform(on_cpu: Callable, elsewhere: Callable, *operands: Array) -> Any:
    """One of two functions of the operands, chosen when a program is lowered: it may be exported for both."""
    return lax.platform_dependent(*operands, cpu=on_cpu, default=elsewhere)


def step_loop() -> StepLoop:
    """How many training steps one call of a compiled program runs.

    "epoch" on accelerators, which must not wait for the host. On a CPU "block", any number of steps, so that progress
    can be shown; with lax "step", because XLA's weight gradients take 10 times as long and more in a loop (jax issue
    12868).
    """
    if jax.default_backend() != "cpu":
        return "epoch"
    return "block" if conv_backend()[0] == "onednn" else "step"


def default_dtype() -> tuple[str, str]:
    """The compute dtype of recipes that leave it to the device, and the reason in a few words.

    The fastest that is as accurate as float32: measured on CPUs (`docs/cpu.md`), elsewhere the dtype of the originals.
    """
    if jax.default_backend() == "tpu":
        return "bfloat16", "TPUs multiply it in hardware"
    if jax.default_backend() != "cpu":
        return "float16", "the dtype of the original recipes, which every GPU with tensor cores multiplies in hardware"
    if conv_backend()[0] == "onednn" and not {"avx512_bf16", "amx_bf16"}.isdisjoint(_cpu_info().split()):
        return "mixed", "this CPU multiplies bfloat16 in hardware"
    return "float32", "this CPU does not multiply bfloat16 in hardware, or has no oneDNN"


def check_dtype(dtype: str) -> None:
    """Checks that a compute dtype is computed as such on this device.

    Raises:
      ValueError: it would be computed in float32.
    """
    device = jax.devices()[0]
    if dtype == "float64" and not jax.config.read("jax_enable_x64"):
        raise ValueError("float64 needs JAX's 64-bit mode; set the environment variable JAX_ENABLE_X64=1")
    if device.platform == "gpu" and dtype == "mixed":
        raise ValueError("mixed is for CPUs: on a GPU XLA converts the bfloat16 operands to float32; use float16")
    capability = str(getattr(device, "compute_capability", ""))  # "7.0"; "gfx90a" on AMD
    if dtype == "bfloat16" and capability[:1].isdigit() and float(capability) < 8:
        raise ValueError(
            f"{device.device_kind} has no bfloat16 (compute capability {capability}, needed 8.0): XLA would compute in "
            "float32; use float16"
        )


@functools.cache
def compiler_options() -> dict[str, Any]:
    """Options for compiling a training program: vectors as wide as the CPU's, of which XLA uses half by default."""
    if jax.default_backend() != "cpu" or "avx512f" not in _cpu_info().split():
        return {}
    return known_options({"xla_cpu_prefer_vector_width": 512})


def known_options(options: dict[str, Any]) -> dict[str, Any]:
    """`options` if this jaxlib accepts them, which is tried on a trivial program; else none."""
    try:
        jax.jit(lambda x: x, compiler_options=options)(0.0)
    except jax.errors.JaxRuntimeError:  # "No such compile option"
        return {}
    return options


def configure(deterministic: bool = False) -> None:
    """Sets what a run needs from the whole process; call it before anything asks JAX for a device.

    On a CPU:

    * Freed memory is kept, see `keep_freed_memory`.
    * Calls are synchronous. With asynchronous ones XLA frees the temporary arrays of a call only after the next one has
      begun: blocks of steps of `final` at half width took 4.7 GiB instead of 1.8.
    * The persistent compilation cache is off where oneDNN is used: programs that call it cannot be written to the
      cache, and JAX would try and warn in every process.

    On an accelerator compiled programs are kept, see `keep_compiled_programs`.

    Args:
      deterministic: makes XLA choose kernels on a GPU that add in a fixed order; a CPU's always do.
    """
    if deterministic and DETERMINISTIC not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC}".strip()
    keep_freed_memory()  # first: asking for the backend starts XLA's threads
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if conv_backend()[0] == "onednn":
        jax.config.update("jax_enable_compilation_cache", False)
    if jax.default_backend() != "cpu":
        keep_compiled_programs()


def keep_compiled_programs() -> None:
    """Makes JAX keep compiled programs in the user's cache folder; warns if that cannot be written.

    A folder that the user chose (`JAX_COMPILATION_CACHE_DIR`) stays, with JAX's own threshold of a second.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or getattr(jax.config, "jax_compilation_cache_dir", None):
        return
    folder = _cache_folder() / "compiled"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # JAX runs what it finds there
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        logging.getLogger("fastcifar_jax").warning(
            "warning: compiled programs are not kept: %s; set JAX_COMPILATION_CACHE_DIR to a writable folder",
            error,
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", COMPILE_SECONDS)


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory instead of returning it to the system; does nothing with another C library.

    XLA:CPU allocates its temporary arrays anew in every call, and PyTorch in every operation; faulting their pages in
    again costs several times the work done on them. Call it before XLA starts its threads, each of which would get an
    arena of its own that still returns memory.

    glibc takes the smallest free gap that fits. A small allocation in the gap of a freed array of 2 GB would make the
    next such array take 2 GB more, so a smaller gap is made first; unused, it costs address space only.
    """
    with contextlib.suppress(AttributeError, OSError):  # not glibc
        libc = ctypes.CDLL(None)
        mallopt, malloc, free = libc.mallopt, libc.malloc, libc.free
        malloc.argtypes, malloc.restype, free.argtypes = (ctypes.c_size_t,), ctypes.c_void_p, (ctypes.c_void_p,)
        trim_threshold, mmap_max, arena_max = -1, -4, -8
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)  # never
        mallopt(arena_max, 1)
        gap = malloc(_GAP)
        malloc(2**20)  # never freed, so that the gap stays one
        free(gap)
