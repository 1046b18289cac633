"""Hostile values, damaged files, and how often each target is tried."""

import struct
import zlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

COUNTS = (20, pytest.param(2_000, marks=pytest.mark.slow, id="slow"))
EXTREMES = tuple(
    sign * (1 << bits) + more for bits in (0, 7, 8, 15, 16, 31, 32, 63) for sign in (1, -1) for more in (-1, 0)
)


def fuzz(count, strategy, body):
    """Calls `body` with `count` values of `strategy`, the same ones every time, however long each takes."""
    checks = list(HealthCheck)
    settings(max_examples=count, derandomize=True, deadline=None, suppress_health_check=checks)(given(strategy)(body))()


def mutants(content):
    """Strategies of the bytes `content` that are damaged, one or a few places at a time."""
    position = st.integers(0, len(content) - 1)

    def flip(changes):
        flipped = bytearray(content)
        for where, value in changes:
            flipped[where] = value
        return bytes(flipped)

    def number(where, value, size, order):
        field = (value % (1 << 8 * size)).to_bytes(size, order)
        return content[:where] + field + content[where + size :]

    return st.one_of(
        st.lists(st.tuples(position, st.integers(0, 255)), min_size=1, max_size=8).map(flip),
        position.map(lambda end: content[:end]),
        st.tuples(position, position).map(lambda pair: content[: pair[0]] + content[pair[1] :]),
        st.tuples(position, st.binary(max_size=24)).map(lambda at: content[: at[0]] + at[1] + content[at[0] :]),
        st.builds(
            number,
            position,
            st.sampled_from(EXTREMES),
            st.sampled_from((1, 2, 4, 8)),
            st.sampled_from(("little", "big")),
        ),
    )


def png_of(chunks):
    """A PNG file of these (name, content), with right lengths and checksums."""
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
