"""What produced a run besides its recipe and seed: the only account of it, in records and checkpoints alike."""

import contextlib
import dataclasses
import hashlib
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, TypedDict

import jax

from fastcifar_jax import __version__
from fastcifar_jax.data.load import DataInfo
from fastcifar_jax.ops import backend
from fastcifar_jax.serialization import from_plain

_JAX_OPTIONS = (
    "jax_enable_x64", "jax_default_prng_impl", "jax_threefry_partitionable", "jax_default_matmul_precision",
)  # fmt: skip
_VARIABLES = ("XLA_FLAGS", "ONEDNN_MAX_CPU_ISA")


class Data(TypedDict):
    """The data of a run."""

    source: str  # as given: a name or a path
    hash: str  # SHA-256, in hexadecimal, of the images and labels
    train: int  # number of training images
    test: int  # number of test images


class Device(TypedDict):
    """The machine of a run."""

    kind: str  # of the accelerator, as JAX names it
    platform: str  # "cpu", "gpu" or "tpu"
    count: int
    cpu: str  # model of the processor
    cores: int | None  # usable by the process


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Everything outside the recipe and the seed that the numbers of a run depend on."""

    data: Annotated[dict[str, Any], Data]
    device: Annotated[dict[str, Any], Device]
    versions: dict[str, str]  # of Python and the packages that matter
    source_hash: str  # of the package's and the experiment's source files
    precision: str  # the compute dtype
    conv: str  # the convolution backend: "lax", "onednn" or "torch"
    mesh: str  # number of devices along the axes seed and batch, "4x2"
    settings: dict[str, bool | str | None]  # JAX options and environment variables that change numbers

    def diff(self, other: "Provenance") -> dict[str, tuple[Any, Any]]:
        """Dotted names whose values differ, as `(self, other)`: `{"versions.jax": ("0.10.2", "0.12.0")}`.

        None stands for a value that one of the two does not have.
        """
        a, b = _flatten(self), _flatten(other)
        return {name: (a.get(name), b.get(name)) for name in {**a, **b} if a.get(name) != b.get(name)}

    def to_dict(self) -> dict[str, Any]:
        """As nested dicts of JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, value: Any) -> "Provenance":
        """The inverse of `to_dict`.

        Raises:
          ValueError: `value` lacks a field or has one of another type; the message names it.
        """
        return from_plain(value, cls, "provenance")


def collect(
    info: DataInfo,
    experiment: Path,
    precision: str,
    *,
    mesh: str = "1x1",
    conv_backend: str | None = None,
    more_versions: Mapping[str, str] | None = None,
) -> Provenance:
    """The provenance of a run that this process is about to make.

    Args:
      info: the data.
      experiment: file of the recipe.
      precision: compute dtype of the recipe, with "auto" resolved.
      mesh: number of devices along the axes seed and batch.
      conv_backend: what computes the convolutions; None for the backend of JAX on this machine.
      more_versions: of the packages of another framework.
    """
    return Provenance(
        data={"source": info.source, "hash": info.hash, "train": info.train, "test": info.test},
        device=device(),
        versions={**versions(), **(more_versions or {})},
        source_hash=source_hash(experiment),
        precision=precision,
        conv=conv_backend or backend.conv_backend()[0],
        mesh=mesh,
        settings=settings(),
    )


def data_key(provenance: Provenance) -> tuple[str, int, int]:
    """Hash and numbers of training and test images: runs are comparable if these are equal."""
    return provenance.data["hash"], provenance.data["train"], provenance.data["test"]


def device() -> dict[str, Any]:
    """The machine that JAX computes on."""
    first = jax.devices()[0]
    return {
        "kind": first.device_kind,
        "platform": first.platform,
        "count": jax.device_count(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a number may depend on."""
    packages = {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")}
    return {"python": platform.python_version(), **packages, "fastcifar_jax": __version__}


def source_hash(experiment: Path) -> str:
    """SHA-256, in hexadecimal, of all source files of the package, by relative path, and of the experiment's file."""
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
    names = {path.relative_to(package).as_posix(): path for path in package.rglob("*.py")}
    for name, path in (*sorted(names.items()), (experiment.name, experiment)):
        text = path.read_bytes()
        digest.update(f"{name} {len(text)}\n".encode() + text)
    return digest.hexdigest()


def settings() -> dict[str, bool | str | None]:
    """JAX options and environment variables that change numbers; None for what is not set."""
    options = {name: getattr(jax.config, name, None) for name in _JAX_OPTIONS}
    return {**options, **{name: os.environ.get(name) for name in _VARIABLES}}


def _flatten(provenance):
    items = vars(provenance).items()
    flat = {name: value for name, value in items if not isinstance(value, dict)}
    groups = {name: value for name, value in items if isinstance(value, dict)}
    return flat | {f"{name}.{key}": value for name, group in groups.items() for key, value in group.items()}


def _cpu_model():
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
