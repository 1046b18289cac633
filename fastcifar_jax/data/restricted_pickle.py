"""A restricted unpickler for the batches of CIFAR: plain values and integer arrays.

Restricting `find_class` is not enough for an untrusted file, so there are three more restrictions:
* Python's implementation, whose memo is a dictionary; C's is an array, for which nine bytes can allocate 32 GiB;
* a limit for the number of opcodes; half a megabyte of gzip can hold 500 million of them, an empty dictionary each;
* text as the only keys, and no sets; a tuple that holds a tuple twice, and so on, takes exponential time to hash.
"""

import io
import itertools
import pickle
import pickletools
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

MAX_OPCODES = 1_000_000  # about 100 bytes each; CIFAR-100's largest pickle has 0.3 million
FUNCTIONS = "_codecs.encode numpy.ndarray numpy.dtype multiarray._reconstruct numeric._frombuffer".split()


@dataclass(eq=False, repr=False)
class _Call:
    """A call in a pickle, which is not made, and the state that the pickle sets on its result."""

    function: str
    args: tuple
    state: Any = None

    def __setstate__(self, state):
        self.state = state


class _Unpickler(pickle._Unpickler):  # type: ignore[name-defined,misc]
    def load_dict(self):
        items = self.pop_mark()
        self.append({text_of(key): value for key, value in zip(items[::2], items[1::2], strict=True)})

    def load_setitems(self):
        self.load_dict()
        items = self.stack.pop()
        self.stack[-1].update(items)

    def load_setitem(self):
        value, key = self.stack.pop(), self.stack.pop()
        self.stack[-1][text_of(key)] = value

    def load_set(self):
        raise pickle.UnpicklingError("it holds a set; expected plain values and arrays")

    dispatch = pickle._Unpickler.dispatch | {  # type: ignore[attr-defined]
        pickle.DICT[0]: load_dict,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.EMPTY_SET[0]: load_set,
        pickle.FROZENSET[0]: load_set,
    }

    def find_class(self, module, name):
        function = re.sub(r"^numpy\._?core\.", "", f"{module}.{name}")  # NumPy 2 renamed numpy.core
        if function not in FUNCTIONS:
            raise pickle.UnpicklingError(f"it asks for '{function:.100}', which is not part of an integer array")
        return lambda *args: _Call(function, args)


def unpickle(data: bytes) -> dict[str, Any]:
    """The dictionary in a pickle; its integer arrays are read-only views of the pickled bytes.

    Raises:
      Exception: of any type, for a damaged pickle or one with other contents: call it within `as_data_error`.
    """
    opcodes = pickletools.genops(data)  # compares the length of every value with the bytes that are there
    if next(itertools.islice(opcodes, MAX_OPCODES, None), None):
        raise pickle.UnpicklingError(f"it has more than {MAX_OPCODES:,} opcodes")
    held = _Unpickler(io.BytesIO(data), encoding="bytes").load()
    if not isinstance(held, dict):
        raise pickle.UnpicklingError(f"it holds a {type(held).__name__}; expected a dictionary")
    return {key: _as_array(value) for key, value in held.items()}


def text_of(value: Any) -> str:
    """A string, as Python 2 (bytes) or Python 3 (text, or a call that makes bytes of it) has pickled it."""
    match value:
        case bytes():
            return value.decode("latin1")
        case str(text) | _Call("_codecs.encode", (str(text), _)):
            return text
    raise pickle.UnpicklingError(f"it holds a {type(value).__name__}; expected text")


def _as_array(value):
    match value:
        case _Call("multiarray._reconstruct", _, (_, shape, _Call("numpy.dtype", (code, *_), state), fortran, raw)):
            order = "F" if fortran else "C"
        case _Call("numeric._frombuffer", (raw, _Call("numpy.dtype", (code, *_), state), shape, order)):
            pass
        case _:
            return value
    code = (text_of(state[1]) if state else "|") + text_of(code)  # the byte order, then kind and size
    if not re.fullmatch("[<>|][iu][1248]", code):
        raise pickle.UnpicklingError(f"it holds an array of type '{code:.50}'; expected integers")
    raw = raw if isinstance(raw, bytes | bytearray) else text_of(raw).encode("latin1")
    return np.frombuffer(raw, code).reshape(shape, order=order)
