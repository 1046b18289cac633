"""A restricted unpickler: plain values and integer arrays, nothing else.

A pickle is a program. Its instructions are looked through before it runs, because Python's unpickler allocates whatever
length or memo index one names; then it runs with no function but those of integer arrays, and of these with stand-ins
that build nothing but views of the bytes that are there.
"""

import io
import math
import pickle
import pickletools
import re

import numpy as np

_OPCODES = set("PROTO FRAME MARK STOP PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET".split())
_OPCODES |= set("NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 STRING BINSTRING SHORT_BINSTRING".split())
_OPCODES |= set("UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8".split())
_OPCODES |= set("EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST APPEND APPENDS".split())
_OPCODES |= set("EMPTY_DICT DICT SETITEM SETITEMS GLOBAL STACK_GLOBAL REDUCE BUILD".split())


MAX_INSTRUCTIONS = 2_000_000  # CIFAR-100's largest pickle has 0.3 million; each may make an object of 100 bytes
MAX_TUPLES_AGAIN = 16  # NumPy's own pickles use none twice


def unpickle(data: bytes) -> dict:
    """The dictionary that the pickle `data` describes, if it is made of plain values and integer arrays.

    Returns:
      The dictionary, its keys as strings whichever Python wrote them, its arrays as views of bytes.

    Raises:
      Exception: of any kind, from the parser or for a pickle that asks for anything else: call it
        within `as_data_error`.
    """
    memo, tuples, again, previous = 0, set(), 0, ""
    for count, (opcode, arg, _) in enumerate(pickletools.genops(data)):  # also checks that every length named is there
        name = opcode.name
        if count >= MAX_INSTRUCTIONS:
            raise pickle.UnpicklingError(f"it has more than {MAX_INSTRUCTIONS:,} instructions")
        if name not in _OPCODES or (name.endswith("PUT") and (arg or 0) > len(data)):
            raise pickle.UnpicklingError(f"it holds the instruction {name} {arg!s:.50}")
        if name == "MEMOIZE" or name.endswith("PUT"):
            slot = memo if name == "MEMOIZE" else arg
            memo += 1
            if previous.endswith(("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")):
                tuples.add(slot)
        again += name.endswith("GET") and arg in tuples
        if again > MAX_TUPLES_AGAIN:  # a key (t, t) of tuples (t, t) of tuples ... takes for ever to hash
            raise pickle.UnpicklingError("it uses tuples again and again")
        previous = name
    held = _Unpickler(data).load()
    if not isinstance(held, dict):
        raise pickle.UnpicklingError(f"it holds a {type(held).__name__}; expected a dictionary")
    return {text_of(k): v.value if isinstance(v, _Array) else v for k, v in held.items()}


class _Unpickler(pickle.Unpickler):
    def __init__(self, data):
        super().__init__(io.BytesIO(data), encoding="bytes")
        self.encode = _encoder(len(data))

    def find_class(self, module, name):
        # New functions for each pickle: the instruction BUILD can write attributes to whatever it is given.
        match module.replace("numpy._core", "numpy.core"), name:
            case "numpy", "ndarray":
                return "ndarray"
            case "numpy", "dtype":
                return lambda code, *flags: _Dtype(code)
            case "numpy.core.multiarray", "_reconstruct":
                return lambda *empty: _Array()
            case "numpy.core.numeric", "_frombuffer":
                return lambda raw, dtype, shape, order: _Array().fill(raw, dtype, shape, order == "F")
            case "_codecs", "encode":
                return self.encode
        raise pickle.UnpicklingError(f"it asks for '{module:.50}.{name:.50}', which is no part of an integer array")


def _encoder(left):
    def encode(text, encoding):  # how Python 3 writes bytes into old pickles
        nonlocal left
        left -= len(text)
        if left < 0:  # by naming one long string many times
            raise pickle.UnpicklingError("it copies more bytes than it holds")
        return text.encode("latin1")

    return encode


class _Dtype:
    """Stands in for `np.dtype`: an integer type, whose byte order comes with the instruction BUILD."""

    def __init__(self, code):
        if not re.fullmatch("[iu][1248]", text_of(code)):
            raise pickle.UnpicklingError(f"it holds an array of type {code!r:.50}; only integers are read")
        self.code, self.order = text_of(code), "|"

    def __setstate__(self, state):
        self.order = text_of(state[1])
        if self.order not in ("<", ">", "|"):
            raise pickle.UnpicklingError(f"it holds an array of byte order {self.order!r:.50}; expected <, > or |")


class _Array:
    """Stands in for `np.ndarray`, whose shape and bytes come with the instruction BUILD."""

    value = None

    def __setstate__(self, state):
        _, shape, dtype, fortran, raw = state
        self.fill(raw, dtype, shape, fortran)

    def fill(self, raw, dtype, shape, fortran):
        if not isinstance(raw, bytes | bytearray) or not isinstance(dtype, _Dtype):
            raise pickle.UnpicklingError("it holds an array that is not made of bytes; only integers are read")
        if not isinstance(shape, tuple) or len(shape) > 4 or math.prod(shape) * int(dtype.code[1]) != len(raw):
            raise pickle.UnpicklingError(f"it holds an array of shape {shape!s:.80} in {len(raw)} bytes")
        self.value = np.frombuffer(raw, dtype.order + dtype.code).reshape(shape, order="F" if fortran else "C")
        return self


def text_of(value):
    """A string, whichever of bytes and string Python 2 or 3 wrote."""
    return value.decode("latin1") if isinstance(value, bytes) else value
