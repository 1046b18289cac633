"""One run = one JSON file, written whole or not at all, and its DAWNBench log beside it."""

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import os
import platform
import re
import stat
import sys
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from fastcifar_jax import __version__
from fastcifar_jax.types import EpochInfo

STATUSES = ("finished", "diverged", "crashed")
MAX_BYTES = 16 << 20  # of a record's file; an epoch takes about 330
MAX_DEPTH = 50  # of lists and objects in each other
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # control characters, lone surrogates
_DEVICE = ("kind", "platform", "count", "cpu", "cores")
STALE_SECONDS = 3600  # after which whoever wrote a temporary file was killed
RESULT = (
    "test_accuracy", "tta_accuracy", "train_seconds", "setup_seconds", "transfer_seconds", "compile_seconds",
    "images_per_second",
)  # fmt: skip


class RecordError(ValueError):
    """A record that cannot be read or written; the message names the file and the fault."""


@dataclasses.dataclass(frozen=True)
class Record:
    """What is known about one run; the fields are the keys of its file.

    Attributes:
      experiment: name of the recipe.
      framework: that trained it.
      recipe: dotted names and their values, as in `recipe.flatten`.
      recipe_repr: the recipe as a Python expression.
      recipe_hash: names everything in the recipe but its name.
      seed: of the run's key.
      status: "finished", "diverged" or "crashed".
      error: what went wrong; None for a finished run.
      data: its source and hash, and the numbers of train and test images.
      device: kind, platform and count of the accelerators, model and usable cores of the CPU.
      versions: of Python and of the packages that matter.
      source_hash: of the package's and the experiment's source text.
      conv: which convolution was used.
      driver: "python" or "scan".
      command: the arguments of the command line.
      started: UTC, ISO 8601.
      epochs: the epoch table; accuracies as fractions, not finite numbers as null in the file.
      result: accuracies as fractions, seconds and images per second; None unless finished. `train_seconds` counts
        the transfer of the data to the device, the setup and the epochs, but neither compiling nor evaluating.
        Seeds that a device carried together count the elapsed seconds divided by their number.
      strategy: what a device did with several seeds: "loop", "map" or "vmap".
      mesh: devices along the axes seed and batch, "4x2".
    """

    experiment: str
    framework: str
    recipe: dict[str, Any]
    recipe_repr: str
    recipe_hash: str
    seed: int
    status: str
    error: str | None
    data: dict[str, Any]
    device: dict[str, Any]
    versions: dict[str, str]
    source_hash: str
    conv: str
    driver: str
    command: tuple[str, ...]
    started: str
    epochs: tuple[EpochInfo, ...]
    result: dict[str, float] | None
    strategy: str = "loop"
    mesh: str = "1x1"


def path_of(out: Path, framework: str, experiment: str, recipe_hash: str, data_hash: str, seed: int) -> Path:
    """Where the record of a run is kept."""
    folder = re.sub(r"[^\w.-]", "_", experiment).lstrip(".") or "_"
    folder = folder if framework == "jax" else f"{framework}-{folder}"
    return out / folder / f"{recipe_hash}-{data_hash[:8]}-seed{seed}.json"


def make_folder(out: Path) -> None:
    """Makes a folder of records; takes away what killed writers left in it.

    Raises:
      RecordError: it cannot be made or written to.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "not writable")
        _sweep(out)
    except OSError as error:
        raise RecordError(f"cannot write records to {out}: {error.strerror}; choose another --out") from error


def write(record: Record, out: Path, *, tta: bool = False) -> Path:
    """Writes a record, and for a finished run the DAWNBench log beside it.

    Args:
      record: replaces an earlier one of the same run.
      out: folder of all records; made if need be.
      tta: whether the log takes the accuracies with test-time augmentation.

    Returns:
      The path of the JSON file.

    Raises:
      RecordError: it cannot be written; what was there before is still there.
    """
    path = path_of(out, record.framework, record.experiment, record.recipe_hash, record.data["hash"], record.seed)
    fields = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    fields["epochs"] = [epoch._asdict() for epoch in record.epochs]
    text = dumps(fields)
    log = path.with_suffix(".tsv")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if record.status == "finished":
            write_whole({log: dawnbench_log(record, tta).encode(), path: text.encode()})
        else:
            write_whole({path: text.encode()})
            log.unlink(missing_ok=True)
    except OSError as error:
        raise RecordError(
            f"cannot write {path}: {error.strerror or error}; make room or choose another --out"
        ) from error
    return path


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all.

    Raises:
      RecordError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole({path: content})
    except OSError as error:
        raise RecordError(f"cannot write {path}: {error.strerror or error}; choose another place") from error


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of a text in UTF-8."""
    write_bytes(path, text.encode())


def dumps(value: Any) -> str:
    """JSON text; numbers that are not finite become null, and what JSON does not know its `repr`."""
    return json.dumps(_jsonable(value), indent=1, allow_nan=False) + "\n"


def read(path: Path) -> Record:
    """The record in a file; numbers that were not finite are NaN.

    The file may come from anywhere: nothing in it is executed, at most `MAX_BYTES` of it are read, and characters that
    a terminal would obey are spelled out.

    Raises:
      RecordError: the file cannot be read or is no record.
    """
    try:
        text = _bounded_bytes(path).decode()
        fields = json.loads(text, parse_constant=lambda name: _fault(f"{name} is not JSON"))
        return _record(_printable(fields))
    except OSError as error:
        fault = error.strerror or str(error)
    except (ValueError, RecursionError) as error:  # of the JSON, of the encoding, and of `_fault`
        fault = str(error)
    raise RecordError(f"{path} is no record of a run: {fault}; move it away or delete it")


def find(out: Path, **wanted: Any) -> dict[Path, Record]:
    """The records under `out`, by path: `find(out, experiment="final", status="finished")`.

    Args:
      out: folder of all records; none are found where it does not exist.
      **wanted: fields of `Record` and the values that they must have.

    Raises:
      RecordError: a JSON file under `out` is no record.
    """
    records = {path: read(path) for path in sorted(out.glob("*/*.json"))}
    matches = lambda record: all(getattr(record, name) == value for name, value in wanted.items())
    return {path: record for path, record in records.items() if matches(record)}


def gather(paths: Iterable[Path]) -> dict[Path, Record]:
    """The records that paths name: files, folders of records, or the folders of those that `--out` names; each once.

    Raises:
      RecordError: a path without records, or a JSON file that is none.
    """
    found: dict[Path, Record] = {}
    for path in paths:
        files = [path] if path.is_file() else sorted((*path.glob("*.json"), *path.glob("*/*.json")))
        if not files:
            raise RecordError(f"no records in {path}; give the folder that --out of run named, or a record's JSON file")
        found |= {file.resolve(): read(file) for file in files}
    return found


def dawnbench_log(record: Record, tta: bool) -> str:
    """Section 7.10 of the specification: one line an epoch, hours of training and test accuracy in percent.

    The hours count what `train_seconds` counts, so the last line's are those of the result.
    """
    result = record.result or {}
    seconds = result["transfer_seconds"] + result["setup_seconds"]
    lines = ["epoch\thours\ttop1Accuracy"]
    for epoch in record.epochs:
        seconds += epoch.train_seconds
        accuracy = epoch.tta_accuracy if tta else epoch.test_accuracy
        lines.append(f"{epoch.epoch}\t{seconds / 3600:.8f}\t{100 * accuracy:.2f}")
    return "\n".join(lines)


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
    """Of Python and of the packages that a number may depend on."""
    packages = {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")}
    return {"python": platform.python_version(), **packages, "fastcifar_jax": __version__}


def source_hash(experiment: Path) -> str:
    """SHA-256, in hexadecimal, of the package's source files and the experiment's."""
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
    names = {path.relative_to(package).as_posix(): path for path in package.rglob("*.py")}
    for name, path in (*sorted(names.items()), (experiment.name, experiment)):
        text = path.read_bytes()
        digest.update(f"{name} {len(text)}\n".encode() + text)
    return digest.hexdigest()


def write_whole(contents: dict[Path, bytes]) -> None:
    """Puts bytes into files in this order; a disk that fills up does so before the first is put in its place.

    Raises:
      OSError: they cannot be written; what was there before is still there.
    """
    temporaries = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in contents}
    try:
        for path, content in contents.items():
            with temporaries[path].open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path, temporary in temporaries.items():
            os.replace(temporary, path)
    except BaseException:
        for temporary in temporaries.values():
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        raise


def _sweep(folder):
    """Deletes the temporary files of `write_whole` that nobody is writing any more."""
    for path in folder.glob(".*-seed*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                path.unlink()


def _jsonable(value):
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    # A recipe may hold any value; what JSON does not know is kept as text.
    return value if value is None or isinstance(value, str | int) else repr(value)


def _bounded_bytes(path):
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
        _fault("it is a directory or no plain file")
    if status.st_size > MAX_BYTES:
        _fault(f"it has more than {MAX_BYTES:,} bytes, the most that is read")
    return path.read_bytes()


def _printable(value, depth=0):
    if depth > MAX_DEPTH:
        _fault(f"it is nested more than {MAX_DEPTH} deep")
    if isinstance(value, str):
        return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), value)
    if isinstance(value, list):
        return [_printable(item, depth + 1) for item in value]
    if isinstance(value, dict):
        return {_printable(key): _printable(item, depth + 1) for key, item in value.items()}
    return value


def _record(fields):
    """`fields` as a `Record`, if they have its names and types."""
    if not isinstance(fields, dict):
        _fault(f"expected an object, got {type(fields).__name__}")
    annotated = {field.name: field.type for field in dataclasses.fields(Record)}
    defaults = {field.name: field.default for field in dataclasses.fields(Record)}
    fields = {**{name: x for name, x in defaults.items() if x is not dataclasses.MISSING}, **fields}
    if missing := sorted(annotated.keys() - fields.keys()):
        _fault(f"it lacks {', '.join(missing)}")
    for name, hint in annotated.items():
        if name not in ("epochs", "command"):
            kinds = dict | None if name == "result" else getattr(hint, "__origin__", hint)
            if not isinstance(fields[name], kinds) or isinstance(fields[name], bool):
                _fault(f"{name} is {fields[name]!r:.80}")
    if fields["status"] not in STATUSES:
        _fault(f"status is {fields['status']!r:.80}; expected one of {', '.join(STATUSES)}")
    if (fields["status"] == "finished") != (fields["result"] is not None):
        _fault(f"status is {fields['status']} and result is {fields['result']!r:.80}")
    if missing := {"source", "hash", "train", "test"} - fields["data"].keys():
        _fault(f"data lacks {', '.join(sorted(missing))}")
    for name, kind in {"source": str, "hash": str, "train": int, "test": int}.items():
        if type(fields["data"][name]) is not kind:
            _fault(f"{name} of data is {fields['data'][name]!r:.80}; expected {kind.__name__}")
    if missing := [name for name in _DEVICE if name not in fields["device"]]:
        _fault(f"device lacks {', '.join(missing)}")
    epochs = fields["epochs"]
    if not isinstance(epochs, list) or not isinstance(fields["command"], list):
        _fault("epochs and command must be lists")
    if not all(isinstance(text, str) for text in (*fields["command"], *fields["versions"].values())):
        _fault("command and versions must be of texts")
    rows = tuple(EpochInfo(**_numbers(row, EpochInfo._fields, "a row of epochs")) for row in epochs)
    result = None if fields["result"] is None else _numbers(fields["result"], RESULT, "result")
    known = {name: fields[name] for name in annotated}
    return Record(**{**known, "epochs": rows, "command": tuple(fields["command"]), "result": result})


def _numbers(row, names, what):
    """The `names` of `row`, which must be numbers or null."""
    if not isinstance(row, dict) or not all(name in row for name in names):
        _fault(f"{what} is {row!r:.80}; expected {', '.join(names)}")
    # Neither 1e999, which is read as infinity, nor a whole number that no float can hold.
    is_number = lambda x: type(x) in (int, float) and abs(x) <= sys.float_info.max
    if bad := [name for name in names if not (is_number(row[name]) or (row[name] is None and name != "epoch"))]:
        _fault(f"{bad[0]} in {what} is {row[bad[0]]!r:.80}; expected a number or null")
    return {name: math.nan if row[name] is None else row[name] for name in names}


def _fault(message):
    raise ValueError(message)


def _cpu_model():
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
