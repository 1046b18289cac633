"""The GPU that JAX should use, what keeps JAX from using it, and the cores that a process may use.

Requirements of JAX's wheels are those of https://docs.jax.dev/en/latest/installation.html (read for jax 0.10.2).
"""

import glob
import importlib.metadata
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax

SMI_SECONDS = 10  # without persistence mode, nvidia-smi first loads the driver
PACKAGES = ("jax", "jaxlib", *(f"jax-cuda{major}-{part}" for major in (13, 12) for part in ("plugin", "pjrt")))
MIN_DRIVER = {"cuda12": 525, "cuda13": 580}  # on Linux
MIN_CAPABILITY_13 = (7, 5)  # Turing; CUDA 13 has no code for older GPUs
# NVIDIA's support matrix of cuDNN 9.10.2 lists Volta and older; later releases dropped them.
OLD_CUDNN = "nvidia-cudnn-cu12<9.11"


class Gpu(NamedTuple):
    """An NVIDIA GPU; "" for what is unknown."""

    name: str  # "NVIDIA A100-SXM4-40GB"
    driver: str = ""  # version, "580.65.06"
    capability: str = ""  # compute capability, "8.0"


class Problem(NamedTuple):
    """A reason why JAX does not use a GPU, and what repairs it."""

    reason: str
    repair: str


def find_gpus(device_files: str = "/dev/nvidia[0-9]*") -> list[Gpu]:
    """The NVIDIA GPUs of this machine, whether JAX can use them or not; takes microseconds where there are none.

    Args:
      device_files: pattern of the devices, which count where `nvidia-smi` is not on PATH or fails.
    """
    command = shutil.which("nvidia-smi")
    for fields in ("name,driver_version,compute_cap", "name,driver_version"):  # old ones do not have the third
        if command and (lines := _run([command, f"--query-gpu={fields}", "--format=csv,noheader"])):
            return [Gpu(*map(str.strip, line.rsplit(",", fields.count(",")))) for line in lines]
    return [Gpu("NVIDIA GPU") for _ in glob.glob(device_files)]


def _run(command: list[str]) -> list[str]:
    """The lines that a command prints; none if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SMI_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def package_versions(names: Iterable[str] = PACKAGES) -> dict[str, str]:
    """The versions of those packages that are installed."""
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def gpu_problems(gpu: Gpu, packages: Mapping[str, str], environment: Mapping[str, str] = os.environ) -> list[Problem]:
    """What keeps JAX from using a GPU, as far as versions and variables show it.

    Args:
      gpu: of this machine.
      packages: versions of those of `PACKAGES` that are installed.
      environment: variables of this process.
    """
    problems = []
    if _cpu_is_chosen(environment):
        problems.append(Problem(f"JAX_PLATFORMS={environment['JAX_PLATFORMS']} chooses the CPU", "unset JAX_PLATFORMS"))
    if (visible := environment.get("CUDA_VISIBLE_DEVICES")) in ("", "-1"):
        problems.append(Problem(f"CUDA_VISIBLE_DEVICES={visible} hides the GPUs", "unset CUDA_VISIBLE_DEVICES"))

    capability = _numbers(gpu.capability)
    old_gpu = capability != () and capability < MIN_CAPABILITY_13
    driver = (_numbers(gpu.driver) or (0,))[0]
    install = {extra: f'pip install -U "jax[{extra}]=={packages["jax"]}"' for extra in MIN_DRIVER}
    install["cuda12"] += f' "{OLD_CUDNN}"' if old_gpu else ""
    replace_13 = f"pip uninstall -y jax-cuda13-plugin jax-cuda13-pjrt && {install['cuda12']}"
    runs_12 = driver >= MIN_DRIVER["cuda12"]
    extra = next((extra for extra in ("cuda13", "cuda12") if any(extra in name for name in packages)), None)

    if extra is None:
        best = "cuda12" if old_gpu or (runs_12 and driver < MIN_DRIVER["cuda13"]) else "cuda13"
        return [*problems, Problem("no CUDA plugin of JAX is installed", install[best])]
    found = {name: packages.get(name, "missing") for name in (f"jax-{extra}-plugin", f"jax-{extra}-pjrt")}
    if wrong := [f"{name} is {v}" for name, v in found.items() if _numbers(v) != _numbers(packages["jaxlib"])]:
        problems.append(Problem(f"{' and '.join(wrong)}, but jaxlib is {packages['jaxlib']}", install[extra]))
    if old_gpu and extra == "cuda13":
        reason = f"CUDA 13 needs compute capability 7.5 or higher, and {gpu.name} has {gpu.capability}"
        problems.append(Problem(reason, replace_13))
    elif driver and driver < MIN_DRIVER[extra]:
        reason = f"CUDA {extra[-2:]} needs driver {MIN_DRIVER[extra]} or newer, and the driver is {gpu.driver}"
        instead = f"; or {replace_13}" if runs_12 else ""
        problems.append(Problem(reason, f"update the NVIDIA driver to {MIN_DRIVER[extra]} or newer{instead}"))
    return problems


def start_problems() -> list[Problem]:
    """What JAX reports if it cannot open a GPU although nothing is wrong with versions and variables; starts JAX."""
    try:
        jax.devices("cuda")
    except RuntimeError as error:
        reason = f"JAX cannot open the GPU: {' '.join(str(error).split())}"
        return [Problem(reason, "set TF_CPP_MIN_LOG_LEVEL=0 to see more")]
    return []


def unused_gpu() -> tuple[Gpu, str] | None:
    """A GPU that JAX does not use although nobody chose the CPU, and the reason; starts JAX."""
    if jax.default_backend() != "cpu" or _cpu_is_chosen(os.environ) or not (gpus := find_gpus()):
        return None
    problems = gpu_problems(gpus[0], package_versions()) or start_problems()
    return gpus[0], problems[0].reason if problems else "its configuration chooses the CPU"


def _cpu_is_chosen(environment: Mapping[str, str]) -> bool:
    return environment.get("JAX_PLATFORMS", "").split(",")[0] == "cpu"


def _numbers(version: str) -> tuple[int, ...]:
    """(7, 5) of "7.5", (0, 10, 2) of "0.10.2.post1", the part that JAX compares; () of other text."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> float | None:
    """The processor time that the control groups of this process grant it, in cores; None without a limit.

    Args:
      root: where the control groups are mounted; version 1 has one folder per controller there.
      membership: the groups of this process, one `ID:CONTROLLERS:PATH` per line.
    """
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return None
    quotas = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers or "cpu" in controllers.split(","):
            base = root / "cpu" if controllers else root
            folder = base / path.strip("/")
            quotas += [_quota(group) for group in (folder, *folder.parents) if group.is_relative_to(base)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota(group: Path) -> float | None:
    try:
        if (file := group / "cpu.max").exists():
            quota, period = file.read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError):  # no such group in a container; "max"
        return None


def loaded_libraries(word: str, maps: Path = Path("/proc/self/maps")) -> list[str]:
    """Paths of the libraries in this process whose file names start with a word."""
    try:
        lines = maps.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return []
    paths = {line.split(maxsplit=5)[-1] for line in lines if "/" in line}
    return sorted(path for path in paths if Path(path).name.startswith(word))
