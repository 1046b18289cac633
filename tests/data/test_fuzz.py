"""Whatever the bytes of a file: data or one DataError, nothing executed, and few allocations.

Bytes are changed blindly, and with care: lengths and checksums fit, and only the claims are false.
"""

import contextlib
import gzip
import io
import pickletools
import struct
import tarfile
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from fastcifar_jax.cli import models
from fastcifar_jax.data.load import DataError, load_data
from tests.helpers_data import SMALL, binary_files, python_files, tar_bytes, write_folder, write_images, write_npz
from tests.helpers_fuzz import COUNTS, EXTREMES, fuzz, mutants, png_of

SENTINEL = "was_executed"
MAX_PEAK = 64 << 20  # bytes that reading a file of a few kB may allocate
PYTHON, PYTHON5, BINARY = python_files(SMALL), python_files(SMALL, protocol=5), binary_files(SMALL)
TAR = tar_bytes(BINARY)


def saved(write):
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


NPZ = saved(lambda buffer: write_npz(buffer, SMALL))
PNG, JPEG = (
    saved(lambda buffer, ending=ending: Image.fromarray(SMALL.test_images[0]).save(buffer, ending))
    for ending in ("png", "jpeg")
)

# Pickles: opcodes exchanged, repeated and left out one by one, and programs of random opcodes.

TOUCH, OPEN = f"touch {SENTINEL}".encode(), f"open('{SENTINEL}','w')".encode()
PIECES = [
    *(bytes([code]) for code in b"(.0123]})NtleasubRoQ\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94"),
    *(
        b"c" + function + b"\n(U" + bytes([len(argument)]) + argument + b"tR"
        for function, argument in [
            (b"os\nsystem", TOUCH), (b"posix\nsystem", TOUCH), (b"builtins\nexec", OPEN), (b"__builtin__\neval", OPEN),
            (b"numpy\nload", b"x.npy"), (b"numpy.core.multiarray\n_reconstruct", b"u1"), (b"numpy\ndtype", b"u1"),
            (b"numpy\ndtype", b"O"), (b"_codecs\nencode", b"latin1"),
        ]
    ),
    b"K\x01", b"M\x00\x0c", b"J\xff\xff\xff\x7f", b"\x8a\x08" + b"\x7f" * 8, b"I99\n", b"L99L\n", b"F1e999\n",
    b"G" + b"\x7f" * 8, b"U\x04data", b"U\x06labels", b"X\x02\x00\x00\x00u1", b"q\x00", b"h\x00", b"r\xff\xff\x00\x00",
    b"p5\n", b"g5\n", b"C\x03abc", b"cnumpy\ndtype\n", b"cnumpy\nndarray\n", b"cnumpy.core.multiarray\n_reconstruct\n",
    b"cnumpy.core.numeric\n_frombuffer\n", b"c_codecs\nencode\n", b"i" + b"os\nsystem\n", b"Pos\n",
    b"\x95" + b"\xff" * 8, b"\x8e" + b"\xff" * 8, b"B\xff\xff\xff\xff", b"\x97",
]  # fmt: skip
PROGRAMS = st.lists(st.sampled_from(PIECES), max_size=40).map(lambda pieces: b"\x80\x04" + b"".join(pieces) + b".")


def pickles(content):
    starts = [position for *_, position in pickletools.genops(content)]
    parts = [content[start:end] for start, end in zip(starts, [*starts[1:], len(content)], strict=True)]
    change = st.tuples(
        st.integers(0, len(parts) - 1),
        st.sampled_from(("set", "insert", "delete")),
        st.sampled_from((*PIECES, *parts)),
    )

    def apply(changes):
        changed = list(parts)
        for where, how, piece in sorted(changes, key=lambda change: -change[0]):
            changed[where : where + (how != "insert")] = [] if how == "delete" else [piece]
        return b"".join(changed)

    return PROGRAMS | st.lists(change, min_size=1, max_size=4).map(apply)


# Archives: the fields of tar and zip headers, with valid checksums.


def with_fields(content, places, values, checksum=lambda changed, start: None):
    """`content` with one to three fields changed; a place is (start of the header, offset of the field, size)."""

    def apply(changes):
        changed = bytearray(content)
        for (start, offset, size), value in changes:
            changed[start + offset : start + offset + size] = value[:size].ljust(size, b"\0")
            checksum(changed, start)
        return bytes(changed)

    return st.lists(st.tuples(st.sampled_from(places), values), min_size=1, max_size=3).map(apply)


def tar_checksum(changed, start):
    changed[start + 148 : start + 156] = b" " * 8
    changed[start + 148 : start + 156] = b"%06o\0 " % sum(changed[start : start + 512])


TAR_FIELDS = [(0, 100), (100, 8), (124, 12), (136, 12), (156, 1), (157, 100), (257, 8), (329, 8), (345, 155)]
TAR_PLACES = [
    (start, *field)
    for start in range(0, len(TAR), 512)
    if TAR[start + 257 : start + 262] == b"ustar"
    for field in TAR_FIELDS
]
TAR_VALUES = [
    b"", b"0", b"7" * 11, b"\x80" + b"\xff" * 11, b"\xff" * 12, b"\x80" + b"\0" * 10 + b"\x01", b"-1", b" 1 ", b"x",
    b"L", b"K", b"g", b"1", b"2", b"5", b"6", b"S", b"../../x", b"/etc/passwd", b"data_batch_1.bin", b"\xff\xfe",
    b"ustar  \0", b"a/" * 60,
]  # fmt: skip
TAR_HEADERS = with_fields(TAR, TAR_PLACES, st.sampled_from(TAR_VALUES) | st.binary(max_size=12), tar_checksum)


def with_pax(records):
    """The archive with an extended header of these texts before its first file."""
    text = b"".join(b"%d %s=%s\n" % (len(key) + len(value) + 5, key, value) for key, value in records)
    head = tarfile.TarInfo("pax")
    head.type, head.size = b"x", len(text)
    return head.tobuf(tarfile.USTAR_FORMAT) + text.ljust(-(-len(text) // 512) * 512, b"\0") + TAR[512:]


PAX_KEYS = b"size path linkpath mtime hdrcharset GNU.sparse.size GNU.sparse.major GNU.sparse.map".split()
PAX_VALUES = (b"-1", b"9" * 13, b"1e999", b"nan", b"/etc/passwd", b"BINARY", b"1", b"0,9", b"")
PAX = st.tuples(st.sampled_from(PAX_KEYS), st.sampled_from(PAX_VALUES) | st.binary(max_size=9))
ZIP_FIELDS = {  # (offset, size) of the fields of local headers, of the central directory and of its end
    b"PK\3\4": ((4, 2), (6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2)),
    b"PK\1\2": ((8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (32, 2), (42, 4)),
    b"PK\5\6": ((8, 2), (10, 2), (12, 4), (16, 4), (20, 2)),
}


ZIP_PLACES = [
    (start, *field)
    for mark, fields in ZIP_FIELDS.items()
    for start in range(len(NPZ))
    if NPZ.startswith(mark, start)
    for field in fields
]
ZIP_NUMBERS = st.sampled_from((8, 12, 14, 93, 95, 99, 300, *EXTREMES)) | st.integers(0, 1 << 32)
ZIP_HEADERS = with_fields(NPZ, ZIP_PLACES, ZIP_NUMBERS.map(lambda n: (n % (1 << 64)).to_bytes(8, "little")))
DESCRS = (
    "|u1", "<i8", ">i4", "|O", "|V9", "<f8", "|S0", "<U9", "u1,O", [("a", "|O")], None, 3,
    f"__import__('os').system('touch {SENTINEL}')",
)  # fmt: skip
SHAPES = (
    (1 << 46, 32, 32, 3), (-1, 32, 32, 3), (0, 32, 32, 3), (5,), (5, 1), (), (1 << 70,), (5.0,), (True,), 5, "5", None,
    (0, 1 << 62), (32,) * 40,
)  # fmt: skip


def npz_with(key, header, method):
    """An npz file whose array `key` has this header; the length of its text and all checksums fit."""
    out = io.BytesIO()
    write_npz(out, SMALL, **{key: None})
    text = (header if isinstance(header, str) else repr(header)).encode()[:65535]
    with zipfile.ZipFile(out, "a", method) as archive:
        archive.writestr(f"{key}.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(5 * 3072))
    return out.getvalue()


VALUES = {"descr": DESCRS, "fortran_order": (True, False, 2), "shape": SHAPES, "more": (1,)}
HEADERS = st.fixed_dictionaries({}, optional={key: st.sampled_from(values) for key, values in VALUES.items()})
TEXTS = st.sampled_from(("(" * 9000, "{'shape': " + "-" * 9000 + "1}", "9**9**9", "{[]: 1}")) | st.text(max_size=40)
NPY_HEADERS = st.builds(
    npz_with,
    st.sampled_from(("x_train", "y_train", "x_test", "y_test")),
    HEADERS | TEXTS,
    st.sampled_from((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)),
)

# Images: the chunks of a PNG, with their checksums.

PNG_FIELDS = (  # width, height, bits, colour type, compression, filter, interlacing
    (32, 32, 32, 0, 33, 1 << 31), (32, 32, 32, 0, 20_000), (8, 1, 2, 4, 16, 0, 99), (2, 0, 3, 4, 6, 1, 255), (0,), (0,),
    (0, 1, 2),
)  # fmt: skip
PNG_HEADERS = st.tuples(*map(st.sampled_from, PNG_FIELDS)).map(lambda fields: struct.pack(">IIBBBBB", *fields))
PNG_PIXELS = st.sampled_from([zlib.compress(bytes(size)) for size in (32 * (1 + 96), 0, 9, 1 << 20)])
BOMB = zlib.compress(bytes(1 << 24))
NAMES = b"tEXt zTXt iTXt iCCP PLTE tRNS gAMA cHRM pHYs eXIf acTL fcTL fdAT ABCD".split()
CONTENTS = st.sampled_from((b"a\0\0" + BOMB, b"a\0\1\0a\0b\0" + BOMB, b"", bytes(768), bytes(26)))
CHUNKS = st.lists(st.tuples(st.sampled_from(NAMES), CONTENTS | st.binary(max_size=40)), max_size=3)
PNG_CHUNKS = st.builds(
    lambda head, before, data, after: png_of([(b"IHDR", head), *before, (b"IDAT", data), *after, (b"IEND", b"")]),
    PNG_HEADERS,
    CHUNKS,
    PNG_PIXELS | st.binary(max_size=50),
    CHUNKS,
)
BLIND = st.binary(max_size=300)
TARGETS = {
    "pickle": ("data_batch_1", pickles(PYTHON["data_batch_1"]) | mutants(PYTHON["data_batch_1"]) | BLIND),
    "pickle of protocol 5": ("data_batch_1", pickles(PYTHON5["data_batch_1"]) | mutants(PYTHON5["data_batch_1"])),
    "pickled class names": ("batches.meta", pickles(PYTHON["batches.meta"])),
    "binary batch": ("data_batch_1.bin", mutants(BINARY["data_batch_1.bin"]) | BLIND),
    "class names": ("batches.meta.txt", mutants(BINARY["batches.meta.txt"]) | BLIND),
    "tar": ("a.tar", TAR_HEADERS | st.lists(PAX, max_size=4).map(with_pax) | mutants(TAR) | BLIND),
    "gzip": ("a.tar.gz", mutants(gzip.compress(tar_bytes(PYTHON), mtime=0)) | BLIND),
    "zip": ("a.npz", ZIP_HEADERS | mutants(NPZ) | BLIND),
    "npy": ("a.npz", NPY_HEADERS),
    "png": ("train/class000/a.png", PNG_CHUNKS | mutants(PNG) | BLIND),
    "jpeg": ("train/class000/a.jpg", mutants(JPEG) | BLIND),
}


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.filterwarnings("ignore::Warning")  # of Pillow and zipfile, which a command would print
def test_data_files(tmp_path, monkeypatch, target, count):
    monkeypatch.chdir(tmp_path)
    name, strategy = TARGETS[target]
    place = tmp_path / "data"
    if name.startswith("train"):
        write_images(place, SMALL)
    else:
        write_folder(place, {} if name.startswith("a.") else PYTHON if name in PYTHON else BINARY)
    file = place / name
    path = file if name.startswith("a.") else place
    file.write_bytes(b"")
    before = sorted(tmp_path.rglob("*"))

    def body(content):
        file.write_bytes(content)
        tracemalloc.start()
        try:
            with contextlib.suppress(DataError):
                dataset, info = load_data(str(path))
                assert dataset.train_images.dtype == np.uint8 and dataset.train_labels.max() < len(info.classes)
            assert tracemalloc.get_traced_memory()[1] < MAX_PEAK
        finally:
            tracemalloc.stop()

    fuzz(count, strategy, body)
    assert sorted(tmp_path.rglob("*")) == before  # no sentinel, and nothing unpacked


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.filterwarnings("ignore::Warning")
def test_single_images(tmp_path, count):
    images = [Image.new("RGB", (32, 32)), Image.new("P", (40, 33)), Image.new("LA", (32, 32))]
    pngs = [saved(lambda buffer, image=image: image.save(buffer, "png")) for image in images]

    def body(drawn):
        (tmp_path / "a.png").write_bytes(drawn[0])
        with contextlib.suppress(DataError):
            found = models.read_image(tmp_path / "a.png", (32, 32, 3), drawn[1])
            assert found.shape == (32, 32, 3) and found.dtype == np.uint8

    fuzz(count, st.tuples(st.one_of(*map(mutants, pngs)), st.booleans()), body)
