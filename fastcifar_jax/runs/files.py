"""Files written whole or not at all, and JSON files from anywhere."""

import contextlib
import json
import math
import os
import re
import stat
import time
from pathlib import Path
from typing import Any

MAX_BYTES = 16 << 20  # of a JSON file; an epoch of a record takes about 330
MAX_DEPTH = 50  # of nested lists and objects
STALE_SECONDS = 3600  # age at which a temporary file counts as left behind by a killed process
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # control characters, lone surrogates


class RecordError(ValueError):
    """A record, or a file beside it, that cannot be read or written; the message names the file and the fault."""


def write_whole(contents: dict[Path, bytes]) -> None:
    """Writes several files, in this order; if the disk fills up, none of them is replaced.

    Raises:
      OSError: they cannot be written; earlier files of these names are unchanged.
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


def write_bytes(path: Path, content: bytes) -> None:
    """Writes one file whole or not at all; makes its folder if need be.

    Raises:
      RecordError: it cannot be written; an earlier file of this name is unchanged.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole({path: content})
    except OSError as error:
        raise RecordError(f"cannot write {path}: {error.strerror or error}; choose another place") from error


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of a text in UTF-8."""
    write_bytes(path, text.encode())


def remove_stale(folder: Path) -> None:
    """Deletes the temporary files that killed runs left in a folder of records."""
    for path in folder.glob(".*-seed*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                path.unlink()


def dumps(value: Any) -> str:
    """JSON text; numbers that are not finite become null, and values without a JSON type their `repr`."""
    return json.dumps(_jsonable(value), indent=1, allow_nan=False) + "\n"


def read_json(path: Path) -> Any:
    """The value in a JSON file that may come from anywhere.

    At most `MAX_BYTES` are read, and characters that a terminal would interpret are escaped.

    Raises:
      OSError, ValueError, RecursionError: the file cannot be read or is not JSON.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # reading a pipe would block
        raise ValueError("it is a directory or not a plain file")
    if status.st_size > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES:,} bytes")

    def refuse(name):
        raise ValueError(f"{name} is not JSON")

    return _printable(json.loads(path.read_bytes().decode(), parse_constant=refuse))


def _jsonable(value):
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else repr(value)


def _printable(value, depth=0):
    if depth > MAX_DEPTH:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
    if isinstance(value, str):
        return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), value)
    if isinstance(value, list):
        return [_printable(item, depth + 1) for item in value]
    if isinstance(value, dict):
        return {_printable(key): _printable(item, depth + 1) for key, item in value.items()}
    return value
