"""Data files whose inside was changed with care: lengths, checksums and headers fit, and only the claims are false.

Blind changes of bytes are in `test_data_hostile.py`; most of them end at the first checksum.
"""

import contextlib
import gzip
import io
import os
import pickle
import pickletools
import struct
import tarfile
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
from hypothesis import strategies as st

from fastcifar_jax.data import readers
from fastcifar_jax.data import restricted_pickle as unpickle
from fastcifar_jax.data.readers import DataError
from tests.helpers_data import binary_files, python_files, tar_bytes, tiny, write_folder, write_images, write_npz
from tests.helpers_fuzz import COUNTS, EXTREMES, fuzz, mutants, png_of

SENTINEL = "was_executed"
SMALL = tiny(10, 5, 1)
MAX_PEAK = 64 << 20  # bytes that reading a file of a few kB may take


# Pickles: instructions exchanged, repeated and left out one by one, and programs of random instructions.

TOUCH = f"touch {SENTINEL}".encode()
CALLS = [
    b"c" + module + b"\n" + name + b"\n(U" + bytes([len(argument)]) + argument + b"tR"
    for module, name, argument in [
        (b"os", b"system", TOUCH),
        (b"posix", b"system", TOUCH),
        (b"builtins", b"exec", f"open('{SENTINEL}','w')".encode()),
        (b"__builtin__", b"eval", f"open('{SENTINEL}','w')".encode()),
        (b"numpy", b"load", b"x.npy"),
        (b"numpy.core.multiarray", b"_reconstruct", b"u1"),
        (b"numpy", b"dtype", b"u1"),
        (b"numpy", b"dtype", b"O"),
        (b"_codecs", b"encode", b"latin1"),
    ]
]
PIECES = [
    *(bytes([code]) for code in b"(.0123]})NtleasubRoQ\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94"),
    *CALLS, b"K\x01", b"M\x00\x0c", b"J\xff\xff\xff\x7f", b"\x8a\x08" + b"\x7f" * 8, b"I99\n", b"L99L\n", b"F1e999\n",
    b"G" + b"\x7f" * 8,
    b"U\x04data", b"U\x06labels", b"X\x02\x00\x00\x00u1", b"q\x00", b"h\x00", b"r\xff\xff\x00\x00", b"p5\n", b"g5\n",
    b"C\x03abc",
    b"cnumpy\ndtype\n", b"cnumpy\nndarray\n", b"cnumpy.core.multiarray\n_reconstruct\n",
    b"cnumpy.core.numeric\n_frombuffer\n",
    b"c_codecs\nencode\n", b"i" + b"os\nsystem\n", b"Pos\n", b"\x95" + b"\xff" * 8, b"\x8e" + b"\xff" * 8,
    b"B\xff\xff\xff\xff", b"\x97",
]  # fmt: skip
PROGRAMS = st.lists(st.sampled_from(PIECES), max_size=40).map(lambda pieces: b"\x80\x04" + b"".join(pieces) + b".")


def instructions(content):
    starts = [position for *_, position in pickletools.genops(content)]
    return [content[start:end] for start, end in zip(starts, [*starts[1:], len(content)], strict=True)]


def pickle_mutants(content):
    parts = instructions(content)
    place = st.integers(0, len(parts) - 1)
    new = st.sampled_from((*PIECES, *parts))
    change = st.tuples(place, st.sampled_from(("set", "insert", "delete")), new)

    def apply(changes):
        changed = list(parts)
        for where, how, piece in sorted(changes, key=lambda change: -change[0]):
            changed[where : where + (how != "insert")] = [] if how == "delete" else [piece]
        return b"".join(changed)

    return st.lists(change, min_size=1, max_size=4).map(apply)


# Archives: the fields of tar and zip headers, with their checksums set right again.

TAR_FIELDS = [(0, 100), (100, 8), (124, 12), (136, 12), (156, 1), (157, 100), (257, 8), (329, 8), (345, 155)]
TAR_VALUES = [
    b"", b"0", b"7" * 11, b"\x80" + b"\xff" * 11, b"\xff" * 12, b"\x80" + b"\0" * 10 + b"\x01", b"-1", b" 1 ", b"x",
    b"L", b"K", b"g", b"1", b"2",
    b"5", b"6", b"S", b"../../x", b"/etc/passwd", b"data_batch_1.bin", b"\xff\xfe", b"ustar  \0", b"a/" * 60,
]  # fmt: skip


def tar_mutants(content):
    blocks = [start for start in range(0, len(content), 512) if content[start + 257 : start + 262] == b"ustar"]

    def apply(changes):
        changed = bytearray(content)
        for block, (start, size), value in changes:
            changed[block + start : block + start + size] = value[:size].ljust(size, b"\0")
            changed[block + 148 : block + 156] = b" " * 8
            changed[block + 148 : block + 156] = b"%06o\0 " % sum(changed[block : block + 512])
        return bytes(changed)

    change = st.tuples(
        st.sampled_from(blocks), st.sampled_from(TAR_FIELDS), st.sampled_from(TAR_VALUES) | st.binary(max_size=12)
    )
    return st.lists(change, min_size=1, max_size=3).map(apply)


def with_pax(content, records):
    """The archive with an extended header of these texts before its first file."""
    text = b"".join(b"%d %s=%s\n" % (len(key) + len(value) + 5, key, value) for key, value in records)
    head = tarfile.TarInfo("pax")
    head.type, head.size = b"x", len(text)
    return head.tobuf(tarfile.USTAR_FORMAT) + text.ljust(-(-len(text) // 512) * 512, b"\0") + content[512:]


PAX = st.tuples(
    st.sampled_from(
        (
            b"size",
            b"path",
            b"linkpath",
            b"mtime",
            b"hdrcharset",
            b"GNU.sparse.size",
            b"GNU.sparse.major",
            b"GNU.sparse.map",
        )
    ),
    st.sampled_from((b"-1", b"9" * 13, b"1e999", b"nan", b"/etc/passwd", b"BINARY", b"1", b"0,9", b""))
    | st.binary(max_size=9),
)


def zip_mutants(content):
    """Changes fields of the local headers, the central directory and its end."""
    places = [
        (start + offset, size)
        for mark, fields in (
            (b"PK\3\4", ((4, 2), (6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2))),
            (b"PK\1\2", ((8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (32, 2), (42, 4))),
            (b"PK\5\6", ((8, 2), (10, 2), (12, 4), (16, 4), (20, 2))),
        )
        for start in range(len(content))
        if content.startswith(mark, start)
        for offset, size in fields
    ]

    def apply(changes):
        changed = bytearray(content)
        for (start, size), value in changes:
            changed[start : start + size] = (value % (1 << 8 * size)).to_bytes(size, "little")
        return bytes(changed)

    values = st.sampled_from((8, 12, 14, 93, 95, 99, 300, *EXTREMES)) | st.integers(0, 1 << 32)
    return st.lists(st.tuples(st.sampled_from(places), values), min_size=1, max_size=3).map(apply)


DESCRS = (
    "|u1",
    "<i8",
    ">i4",
    "|O",
    "|V9",
    "<f8",
    "|S0",
    "<U9",
    "u1,O",
    [("a", "|O")],
    None,
    3,
    f"__import__('os').system('touch {SENTINEL}')",
)
SHAPES = (
    (1 << 46, 32, 32, 3),
    (-1, 32, 32, 3),
    (0, 32, 32, 3),
    (5,),
    (5, 1),
    (),
    (1 << 70,),
    (5.0,),
    (True,),
    5,
    "5",
    None,
    (0, 1 << 62),
    (32,) * 40,
)
HEADERS = st.fixed_dictionaries(
    {}, optional={"descr": st.sampled_from(DESCRS), "fortran_order": st.booleans() | st.just(2),
    "shape": st.sampled_from(SHAPES), "more": st.just(1)}
)  # fmt: skip


def npz_with(key, header, method):
    """An npz file whose array `key` has this header; the length of its text and all checksums fit."""
    out = io.BytesIO()
    write_npz(out, SMALL, **{key: None})
    text = (header if isinstance(header, str) else repr(header)).encode()[:65535]
    with zipfile.ZipFile(out, "a", method) as archive:
        archive.writestr(f"{key}.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(5 * 3072))
    return out.getvalue()


NPZ = io.BytesIO()
write_npz(NPZ, SMALL)
NPY = st.builds(
    npz_with,
    st.sampled_from(("x_train", "y_train", "x_test", "y_test")),
    HEADERS
    | st.text(max_size=40)
    | st.sampled_from(("(" * 9000, "{'shape': " + "-" * 9000 + "1}", "9**9**9", "{[]: 1}")),
    st.sampled_from((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)),
)


# Images: the chunks of a PNG, with their checksums.


def png_mutants():
    header = lambda width, height, bits, colour, interlace: struct.pack(
        ">IIBBBBB", width, height, bits, colour, 0, 0, interlace
    )
    headers = st.builds(
        header, st.sampled_from((32, 32, 32, 0, 33, 1 << 31)), st.sampled_from((32, 32, 32, 0, 20_000)),
        st.sampled_from((8, 1, 2, 4, 16, 0, 99)), st.sampled_from((2, 0, 3, 4, 6, 1, 255)), st.sampled_from((0, 1, 2)),
    )  # fmt: skip
    pixels = st.sampled_from([zlib.compress(bytes(size)) for size in (32 * (1 + 96), 0, 9, 1 << 20)]) | st.binary(
        max_size=50
    )
    bomb = zlib.compress(bytes(1 << 24))
    names = (
        b"tEXt",
        b"zTXt",
        b"iTXt",
        b"iCCP",
        b"PLTE",
        b"tRNS",
        b"gAMA",
        b"cHRM",
        b"pHYs",
        b"eXIf",
        b"acTL",
        b"fcTL",
        b"fdAT",
        b"ABCD",
    )
    contents = st.sampled_from((b"a\0\0" + bomb, b"a\0\1\0a\0b\0" + bomb, b"", bytes(768), bytes(26))) | st.binary(
        max_size=40
    )
    more = st.lists(st.tuples(st.sampled_from(names), contents), max_size=3)
    return st.builds(
        lambda head, before, data, after: png_of([(b"IHDR", head), *before, (b"IDAT", data), *after, (b"IEND", b"")]),
        headers, more, pixels, more
    )  # fmt: skip


TARGETS = {
    "pickle programs": ("data_batch_1", PROGRAMS),
    "pickle instructions": ("data_batch_1", pickle_mutants(python_files(SMALL)["data_batch_1"])),
    "pickle instructions of protocol 5": (
        "data_batch_1",
        pickle_mutants(python_files(SMALL, protocol=5)["data_batch_1"]),
    ),
    "pickled class names": ("batches.meta", PROGRAMS | pickle_mutants(python_files(SMALL)["batches.meta"])),
    "binary batch": ("data_batch_1.bin", mutants(binary_files(SMALL)["data_batch_1.bin"])),
    "class names": ("batches.meta.txt", mutants(binary_files(SMALL)["batches.meta.txt"]) | st.binary(max_size=200)),
    "tar headers": ("a.tar", tar_mutants(tar_bytes(binary_files(SMALL)))),
    "tar extended headers": (
        "a.tar",
        st.lists(PAX, max_size=4).map(lambda pax: with_pax(tar_bytes(binary_files(SMALL)), pax)),
    ),
    "gzip": ("a.tar.gz", mutants(gzip.compress(tar_bytes(python_files(SMALL)), mtime=0))),
    "zip headers": ("a.npz", zip_mutants(NPZ.getvalue())),
    "npy headers": ("a.npz", NPY),
    "png": ("train/class000/a.png", png_mutants()),
    "jpeg": ("train/class000/a.jpg", None),
}


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.filterwarnings("ignore::Warning")  # of Pillow and zipfile, which a command would print
def test_only_data_errors_nothing_executed_and_little_memory(tmp_path, monkeypatch, target, count):
    monkeypatch.chdir(tmp_path)
    name, strategy = TARGETS[target]
    place = tmp_path / "data"
    if name.startswith("train"):
        write_images(place, SMALL)
    elif "." not in name or name == "batches.meta":
        write_folder(place, python_files(SMALL))
    elif not name.startswith("a."):
        write_folder(place, binary_files(SMALL))
    else:
        place.mkdir()
    file = place / name
    path = file if name.startswith("a.") else place
    if strategy is None:
        strategy = mutants(jpeg())
    file.write_bytes(b"")
    before = sorted(tmp_path.rglob("*"))

    def body(content):
        file.write_bytes(content)
        tracemalloc.start()
        try:
            with contextlib.suppress(DataError):
                dataset, classes = readers.read(path)
                assert dataset.train_images.dtype == np.uint8 and dataset.train_labels.max() < len(classes)
            assert tracemalloc.get_traced_memory()[1] < MAX_PEAK
        finally:
            tracemalloc.stop()

    fuzz(count, strategy, body)
    assert sorted(tmp_path.rglob("*")) == before  # no sentinel, and nothing unpacked


def jpeg():
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(SMALL.test_images[0]).save(out, "jpeg")
    return out.getvalue()


def test_real_pickles_have_far_fewer_instructions_than_are_read():
    filenames = [f"{i}.png".encode() for i in range(50_000)]
    labels = list(range(100)) * 500
    for protocol in (2, 5):
        batch = {
            b"filenames": filenames,
            b"fine_labels": labels,
            b"coarse_labels": labels,
            b"data": np.zeros((1, 3072), np.uint8),
        }
        assert sum(1 for _ in pickletools.genops(pickle.dumps(batch, protocol))) < unpickle.MAX_INSTRUCTIONS / 4


def test_other_packings_of_npz_files(tmp_path):
    np.savez_compressed(
        tmp_path / "a.npz",
        x_train=SMALL.train_images,
        y_train=SMALL.train_labels,
        x_test=SMALL.test_images,
        y_test=SMALL.test_labels,
    )
    readers.read(tmp_path / "a.npz")
    (tmp_path / "b.npz").write_bytes(npz_with("x_train", {}, zipfile.ZIP_LZMA))
    with pytest.raises(DataError, match="packed by method 14; write it by np.savez"):
        readers.read(tmp_path / "b.npz")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    path = write_images(tmp_path / "images", SMALL)
    os.mkfifo(next((path / "train").rglob("*.png")).parent / "z.png")
    with pytest.raises(DataError, match="z.png is a folder or no plain file"):
        readers.read(path)
