"""One run is one JSON file, written whole or not at all, with its DAWNBench log beside it."""

import dataclasses
import errno
import os
import re
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

from fastcifar_jax.runs.files import RecordError, dumps, read_json, remove_stale, write_whole
from fastcifar_jax.runs.provenance import Provenance
from fastcifar_jax.serialization import from_plain
from fastcifar_jax.types import EpochInfo

Status = Literal["finished", "diverged", "crashed"]
STATUSES = typing.get_args(Status)


class Result(TypedDict):
    """The numbers of a finished run: accuracies as fractions, seconds, images per second.

    `train_seconds` includes the transfer of the data to the device, the setup and the epochs, but neither compilation
    nor evaluation. For seeds that are trained together on one device it is the elapsed time divided by their number.
    """

    test_accuracy: float
    tta_accuracy: float
    train_seconds: float
    setup_seconds: float
    transfer_seconds: float
    compile_seconds: float
    images_per_second: float


RESULT = tuple(typing.get_type_hints(Result))


@dataclasses.dataclass(frozen=True)
class Record:
    """Everything recorded about one run; the fields are the keys of its file."""

    experiment: str  # name of the recipe
    framework: Annotated[str, Literal["jax", "torch"]]  # what trained it
    recipe: dict[str, Any]  # `recipe.to_dict`, with the repr of values that JSON cannot hold
    recipe_repr: str  # a Python expression
    recipe_hash: str  # identifies everything in the recipe but its name and published figures
    seed: int  # of the run's key
    status: Status
    error: str | None  # what went wrong; None for a finished run
    provenance: Provenance
    command: tuple[str, ...]  # arguments of the command line
    started: str  # UTC, ISO 8601
    epochs: tuple[EpochInfo, ...]  # accuracies as fractions; numbers that are not finite are null in the file
    result: Annotated[dict[str, float], Result] | None  # None unless finished


def path_of(out: Path, framework: str, experiment: str, recipe_hash: str, data_hash: str, seed: int) -> Path:
    """Path of the record of a run."""
    folder = re.sub(r"[^\w.-]", "_", experiment).lstrip(".") or "_"
    folder = folder if framework == "jax" else f"{framework}-{folder}"
    return out / folder / f"{recipe_hash}-{data_hash[:8]}-seed{seed}.json"


def make_folder(out: Path) -> None:
    """Makes a folder of records; deletes the temporary files that killed runs left in it.

    Raises:
      RecordError: it cannot be made or written to.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "not writable")
        remove_stale(out)
    except OSError as error:
        raise RecordError(f"cannot write records to {out}: {error.strerror}; choose another --out") from error


def write(record: Record, out: Path, *, tta: bool = False) -> Path:
    """Writes a record, and for a finished run the DAWNBench log beside it.

    Args:
      record: replaces an earlier one of the same run.
      out: folder of all records; made if need be.
      tta: whether the log has the accuracies with test-time augmentation.

    Returns:
      The path of the JSON file.

    Raises:
      RecordError: it cannot be written; an earlier record is unchanged.
    """
    data_hash = record.provenance.data["hash"]
    path = path_of(out, record.framework, record.experiment, record.recipe_hash, data_hash, record.seed)
    log = path.with_suffix(".tsv")
    contents = {path: dumps(to_dict(record)).encode()}
    if record.status == "finished":
        contents = {log: dawnbench_log(record, tta).encode(), **contents}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(contents)
        if record.status != "finished":
            log.unlink(missing_ok=True)
    except OSError as error:
        raise RecordError(
            f"cannot write {path}: {error.strerror or error}; make room or choose another --out"
        ) from error
    return path


def to_dict(record: Record) -> dict[str, Any]:
    """The object in a record's file, before `files.dumps`."""
    epochs = [epoch._asdict() for epoch in record.epochs]
    return vars(record) | {"provenance": record.provenance.to_dict(), "epochs": epochs}


def read(path: Path) -> Record:
    """The record in a file, which may come from anywhere; nothing in it is executed. Null numbers are read as NaN.

    Raises:
      RecordError: the file cannot be read or is not a record.
    """
    try:
        record = from_plain(read_json(path), Record, "record")
        if (record.status == "finished") != (record.result is not None):
            raise ValueError(f"status is {record.status} and result is {record.result!r:.80}")
        return record
    except OSError as error:
        fault = error.strerror or str(error)
    except (ValueError, RecursionError) as error:
        fault = str(error)
    raise RecordError(f"{path} is not a record of a run: {fault}; move it away or delete it")


def find(out: Path, **wanted: Any) -> dict[Path, Record]:
    """The records under `out`, by path: `find(out, experiment="final", status="finished")`.

    Args:
      out: folder of all records; none are found where it does not exist.
      **wanted: fields of `Record` and the values that they must have.

    Raises:
      RecordError: a JSON file under `out` is not a record.
    """
    records = {path: read(path) for path in sorted(out.glob("*/*.json"))}
    matches = lambda record: all(getattr(record, name) == value for name, value in wanted.items())
    return {path: record for path, record in records.items() if matches(record)}


def gather(paths: Iterable[Path]) -> dict[Path, Record]:
    """The records in these paths, each once: files, folders of records, or folders that were given to `--out`.

    Raises:
      RecordError: a path without records, or a JSON file that is not a record.
    """
    found: dict[Path, Record] = {}
    for path in paths:
        files = [path] if path.is_file() else sorted((*path.glob("*.json"), *path.glob("*/*.json")))
        if not files:
            raise RecordError(f"no records in {path}; give the folder that --out of run named, or a record's JSON file")
        found |= {file.resolve(): read(file) for file in files}
    return found


def dawnbench_log(record: Record, tta: bool) -> str:
    """Section 7.10 of the specification: one line per epoch, hours of training and test accuracy in per cent.

    With `tta` it is that with test-time augmentation, in the epochs that were evaluated with it. The hours include what
    `train_seconds` includes, so the last line has those of the result.
    """
    assert record.result is not None
    seconds = record.result["transfer_seconds"] + record.result["setup_seconds"]
    lines = ["epoch\thours\ttop1Accuracy"]
    for epoch in record.epochs:
        seconds += epoch.train_seconds
        accuracy = epoch.test_accuracy if epoch.tta_accuracy is None or not tta else epoch.tta_accuracy
        lines.append(f"{epoch.epoch}\t{seconds / 3600:.8f}\t{100 * accuracy:.2f}")
    return "\n".join(lines)
