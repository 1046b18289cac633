"""Files that are small and claim, or unpack into, more memory than a machine has."""

import gzip
import json
import os
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import pytest

from tests.helpers_data import binary_files, python_files, tar_bytes, tiny, write_images, write_npz
from tests.helpers_fuzz import png_of

SMALL = tiny(10, 5, 1)


def bombs(folder):
    """Writes them; yields path and what the refusal must say."""

    def archive(name, files):
        path = folder / f"{name}.tar.gz"
        path.write_bytes(gzip.compress(tar_bytes(files), mtime=0))
        return path

    def npz(name, shape, method, content):
        path = folder / f"{name}.npz"
        write_npz(path, SMALL, x_train=None)
        header = repr({"descr": "|u1", "fortran_order": False, "shape": shape}).encode()
        with zipfile.ZipFile(path, "a", method) as out:
            out.writestr("x_train.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content)
        return path

    yield npz("terabytes", (1 << 30, 32, 32, 3), zipfile.ZIP_STORED, bytes(3072)), "claims 3298534883328 bytes"
    path = npz("bzip2", (5, 32, 32, 3), zipfile.ZIP_BZIP2, bytes(192 << 20))
    data = bytearray(path.read_bytes())  # claims the five images that its header speaks of
    for mark, offset in ((b"PK\1\2", 24), (b"PK\3\4", 22)):
        start = data.rfind(mark)
        data[start + offset : start + offset + 4] = struct.pack("<I", 5 * 3072 + 10 + 64)
    path.write_bytes(data)
    yield path, "packed by method 12"
    big = tarfile.TarInfo("cifar-10-batches-py/data_batch_5")
    big.size = 1 << 40
    path = folder / "member.tar.gz"
    path.write_bytes(gzip.compress(tar_bytes({}, extra=[big])))
    yield path, "claims 1099511627776 bytes"
    yield (
        archive("objects", python_files(SMALL) | {"data_batch_1": b"\x80\x02" + b"}" * (4 << 20)}),
        "more than 2,000,000 instructions",
    )
    yield archive("names", binary_files(SMALL) | {"batches.meta.txt": b"a " * (8 << 20)}), "at most 65,536 are read"
    images = write_images(folder / "images", SMALL)
    victim = next((images / "train").rglob("*.png"))
    text = b"a\0\0" + zlib.compress(bytes(192 << 20))
    victim.write_bytes(
        png_of([(b"IHDR", struct.pack(">IIBBBBB", 32, 32, 8, 2, 0, 0, 0)), (b"zTXt", text), (b"IEND", b"")])
    )
    yield images, "cannot be read"


READ = """
import json, resource, sys
from pathlib import Path
from fastcifar_jax.data import readers
from fastcifar_jax.runs import records
pages = int(Path("/proc/self/statm").read_text().split()[0])
most = pages * resource.getpagesize() + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (most, most))
faults = []
for path in map(Path, sys.argv[2:]):
    try:
        (records if path.suffix == ".json" else readers).read(path)
        faults.append("nothing")
    except ValueError as error:
        faults.append(str(error))
print(json.dumps(faults))
"""


@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="limits the address space by what /proc says is in use"
)
def test_bombs_are_refused_within_128_mib(tmp_path):
    found = list(bombs(tmp_path))
    record = tmp_path / "terabyte.json"
    with record.open("wb") as file:
        file.truncate(1 << 40)  # a sparse file: it takes no room
    found.append((record, "the most that is read"))
    assert sum(path.stat().st_size for path, _ in found[:-2] if path.is_file()) < 2 << 20
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "JAX_PLATFORMS": "cpu"}
    arguments = [sys.executable, "-c", READ, str(128 << 20), *(str(path) for path, _ in found)]
    process = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True)
    for (path, expected), fault in zip(found, json.loads(process.stdout), strict=True):
        assert expected in fault and "MemoryError" not in fault, path.name
