"""The reader of records on files from anywhere: a record that all else can work with, or a RecordError."""

import contextlib
import io
import json
import os

import pytest
from hypothesis import strategies as st
from rich.console import Console

from experiments.bag_of_tricks import final
from fastcifar_jax.analysis import compare as comparison
from fastcifar_jax.cli import console as report
from fastcifar_jax.cli.reproduce import check_reproducible, show_rerun
from fastcifar_jax.runs import records
from fastcifar_jax.runs.files import MAX_BYTES, dumps
from fastcifar_jax.runs.records import RecordError
from fastcifar_jax.runs.reproduce import compare_rerun, recipe_of
from tests.helpers_fuzz import COUNTS, fuzz, mutants
from tests.helpers_records import DIVERGED, RECORD

SENTINEL = "was_executed"
PAYLOAD = f"__import__('pathlib').Path('{SENTINEL}').touch()"
TEXTS = (
    PAYLOAD, "", "\0", "\ud800", "\x1b[2J", "../../etc", "x" * 300, "<script>", "finished", "diverged", "final*",
    "torch", "a.py",
)  # fmt: skip
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.sampled_from(TEXTS),
    st.sampled_from((10**400, -(10**400), 2**63, 1e308, -0.0)),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(TEXTS), inner), max_leaves=5
)


def fields_of(record):
    return json.loads(dumps(records.to_dict(record)))


def places(value, path=()):
    """The path of every value in a JSON value."""
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def changed(fields, changes):
    fields = {"": json.loads(json.dumps(fields))}
    for path, value, delete in changes:
        node = fields
        with contextlib.suppress(KeyError, IndexError, TypeError):  # an earlier change took the place away
            for key in ("", *path)[:-1]:
                node = node[key]
            if delete:
                del node[("", *path)[-1]]
            else:
                node[("", *path)[-1]] = value
    return json.dumps(fields.get("")).encode()


def json_mutants(record):
    """Strategies of a record's file with a few values exchanged or deleted."""
    fields = fields_of(record)
    change = st.tuples(st.sampled_from(list(places(fields))), VALUES, st.booleans())
    return st.lists(change, min_size=1, max_size=3).map(lambda changes: changed(fields, changes))


TARGETS = {
    "bytes": st.binary(max_size=200),
    "json": VALUES.map(lambda value: json.dumps(value).encode()),
    "mutated bytes": mutants(json.dumps(fields_of(RECORD)).encode()),
    "mutated finished": json_mutants(RECORD),
    "mutated diverged": json_mutants(DIVERGED),
}


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("target", TARGETS)
def test_a_usable_record_or_a_record_error(tmp_path, monkeypatch, target, count):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "record.json"

    def body(content):
        path.write_bytes(content)
        try:
            record = records.read(path)
        except RecordError as error:
            assert len(str(error)) < 1000
            return
        use(record, tmp_path / "runs")

    fuzz(count, TARGETS[target], body)
    assert not (tmp_path / SENTINEL).exists()


def use(record, out):
    """All that commands do with a record that they have read; only documented errors may come of it."""
    lines = [report.seed_line("arm", record)]
    assert "\x1b" not in lines[0]
    with contextlib.suppress(ValueError):
        comparison.check_comparable([comparison.Arm("a", (record,)), comparison.Arm("b", (RECORD,))])
    with contextlib.suppress(ValueError):
        check_reproducible(record)
        recipe_of(record, final)
    answer = compare_rerun(record, RECORD)
    console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), markup=False)
    console.print(*lines)
    show_rerun("arm", answer, console)
    json.loads(dumps(answer))
    with contextlib.suppress(RecordError):  # a name that is too long for a file
        again = records.read(records.write(record, out))
        assert repr(again) == repr(records.read(records.write(again, out)))


HOSTILE = {
    "deep lists": (b"[" * 100_000, "recursion"),
    "deep objects": (b'{"a":' * 100_000, "recursion"),
    "lists that are just not too deep": (b"[" * 100 + b"]" * 100, "nested more than 50 deep"),
    "a number of a million digits": (b"1" * 1_000_000, "digits"),
    "NaN": (b'{"seed": NaN}', "NaN is not JSON"),
    "Infinity": (b"[-Infinity]", "-Infinity is not JSON"),
    "an accuracy of 1e999": (changed(fields_of(RECORD), []).replace(b"0.945", b"1e999"), "accuracy: got inf"),
    "an accuracy of 400 digits": (changed(fields_of(RECORD), []).replace(b"0.945", b"9" * 400), "accuracy: got 9999"),
    "a seed of a million digits": (changed(fields_of(RECORD), []).replace(b'"seed": 3', b'"seed": ' + b"3" * 10**6),
    "digits"),
    "UTF-16": (json.dumps(fields_of(RECORD)).encode("utf-16"), "decode"),
    "null bytes": (b"\0" * 1000, "Expecting value"),
    "too large": (b" " * (MAX_BYTES + 1), "more than 16,777,216 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_record(tmp_path, kind):
    content, fault = HOSTILE[kind]
    path = tmp_path / "record.json"
    path.write_bytes(content)
    with pytest.raises(RecordError, match=fault):
        records.read(path)


def test_what_a_terminal_would_obey_is_spelled_out(tmp_path):
    text = "a\x1b[2Jb\rc\0d\ud800e\x9bf\nä"
    path = tmp_path / "record.json"
    path.write_bytes(
        changed(fields_of(DIVERGED), [(("error",), text, False), (("provenance", "data", "source"), text, False)])
    )
    record = records.read(path)
    assert record.error == record.provenance.data["source"] == "a\\x1b[2Jb\\rc\\x00d\\ud800e\\x9bf\nä"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "record.json")
    with pytest.raises(RecordError, match="not a plain file"):
        records.read(tmp_path / "record.json")
