"""Records: what is written is read back, a failed write changes nothing, a foreign file is refused."""

import contextlib
import dataclasses
import io
import json
import math
import os

import pytest
from hypothesis import strategies as st
from rich.console import Console

from experiments.bag_of_tricks import final
from fastcifar_jax.analysis import compare as comparison
from fastcifar_jax.cli import console as view
from fastcifar_jax.cli.reproduce import check_reproducible, show_rerun
from fastcifar_jax.runs import records
from fastcifar_jax.runs.files import MAX_BYTES, dumps
from fastcifar_jax.runs.records import RecordError
from fastcifar_jax.runs.reproduce import compare_rerun, recipe_of
from fastcifar_jax.types import EpochInfo
from tests.helpers_fuzz import COUNTS, SENTINEL, changed, fuzz, mutants
from tests.helpers_records import DIVERGED, RECORD, RESULT


def files(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_round_trip(tmp_path):
    path = records.write(RECORD, tmp_path)
    assert path == tmp_path / "final" / f"{RECORD.recipe_hash}-01234567-seed3.json"
    assert files(tmp_path) == [path.name, path.with_suffix(".tsv").name]
    read = records.read(path)
    assert dataclasses.replace(read, recipe=RECORD.recipe) == RECORD
    assert read.recipe == json.loads(json.dumps(RECORD.recipe))
    assert path.stat().st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_keys_are_those_of_the_specification(tmp_path):
    fields = json.loads(records.write(RECORD, tmp_path).read_text())
    assert list(fields) == [
        "experiment", "framework", "recipe", "recipe_repr", "recipe_hash", "seed", "status", "error", "provenance",
        "command", "started", "epochs", "result",
    ]  # fmt: skip
    assert list(fields["provenance"]) == [
        "data", "device", "versions", "source_hash", "precision", "conv", "mesh", "settings",
    ]  # fmt: skip
    assert list(fields["epochs"][0]) == [
        "epoch", "train_seconds", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "tta_loss",
        "tta_accuracy",
    ]  # fmt: skip


def test_not_finite_numbers_are_null_and_come_back_as_nan(tmp_path):
    path = records.write(DIVERGED, tmp_path)

    def refuse(name):
        raise AssertionError(name)

    row = json.loads(path.read_text(), parse_constant=refuse)["epochs"][0]
    assert [name for name, value in row.items() if value is None] == ["train_loss", "test_loss", "tta_loss"]
    [read] = records.read(path).epochs
    assert (
        math.isnan(read.train_loss)
        and math.isnan(read.test_loss)
        and read.tta_loss is None
        and read.train_seconds == 3.5
    )


def test_values_that_json_does_not_know_are_text(tmp_path):
    path = records.write(
        dataclasses.replace(RECORD, recipe={"dtype": complex, "knots": (1, (2.5, math.inf))}), tmp_path
    )
    assert records.read(path).recipe == {"dtype": "<class 'complex'>", "knots": [1, [2.5, None]]}


def test_dawnbench_log():
    seconds = 74.041416
    result = {**RESULT, "transfer_seconds": 2.0, "setup_seconds": 0.041416}
    epochs = (EpochInfo(1, 36.0, 1, 0.5, 1, 0.5, 1, 0.6), EpochInfo(2, 36.0, 1, 0.9, 1, 0.9408, 1, 0.945))
    record = dataclasses.replace(RECORD, epochs=epochs, result=result)
    lines = "epoch\thours\ttop1Accuracy\n1\t0.01056706\t{}\n2\t0.02056706\t{}"
    assert seconds == pytest.approx(sum(epoch.train_seconds for epoch in epochs) + 2.041416)
    assert records.dawnbench_log(record, tta=False) == lines.format("50.00", "94.08")
    assert records.dawnbench_log(record, tta=True) == lines.format("60.00", "94.50")


def test_log_belongs_to_a_finished_run(tmp_path):
    path = records.write(RECORD, tmp_path, tta=True)
    assert path.with_suffix(".tsv").read_bytes().endswith(b"94.50")
    records.write(DIVERGED, tmp_path)
    assert files(tmp_path) == [path.name]


@pytest.mark.parametrize(("broken", "works"), [("replace", 0), ("fsync", 0), ("fsync", 1)])
def test_failed_write_leaves_what_was_there(tmp_path, monkeypatch, broken, works):
    path = records.write(DIVERGED, tmp_path)
    before = path.read_bytes()
    calls = []

    def full(*args):
        calls.append(args)
        if len(calls) > works:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, broken, full)
    with pytest.raises(RecordError, match=r"cannot write .*seed3.json: No space left on device; make room"):
        records.write(RECORD, tmp_path)
    assert files(tmp_path) == [path.name] and path.read_bytes() == before


def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        records.write(RECORD, tmp_path)
    assert files(tmp_path) == []


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "runs"):
        with pytest.raises(RecordError, match="choose another --out"):
            records.make_folder(out)
        with pytest.raises(RecordError, match="choose another --out"):
            records.write(RECORD, out)


def test_names_cannot_leave_the_folder(tmp_path):
    for name in ("../../up", "..", "/root", "a b"):
        path = records.path_of(tmp_path, "jax", name, "1", "2", 0)
        assert path.parent.parent == tmp_path and path.parent.name not in ("", ".", "..")


def text_of(record=RECORD, **changes):
    return json.dumps(json.loads(dumps(records.to_dict(record))) | changes)


def with_provenance(**changes):
    return text_of(provenance=RECORD.provenance.to_dict() | changes)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "Expecting value"),
        (text_of()[:-30], "Expecting|Unterminated|delimiter"),
        ("[]", r"record: expected Record, got \[\]"),
        ("3", "record: expected Record, got 3"),
        ("{}", "record lacks command, epochs"),
        (text_of().replace("0.9408", "NaN"), "NaN is not JSON"),
        (text_of(status="done"), "record.status: expected one of finished, diverged, crashed, got 'done'"),
        (text_of(framework="abacus"), "record.framework: expected one of jax, torch, got 'abacus'"),
        (text_of(seed="3"), "record.seed: expected int, got '3'"),
        (text_of(seed=True), "seed: expected int, got True"),
        (text_of(seed=3.0), "seed: expected int, got 3.0"),
        (text_of(seed=2**63), r"seed: got 9223372036854775808; give .* whole ones below 2\*\*63"),
        (text_of(recipe=[]), r"recipe: expected dict\[str, Any\], got \[\]"),
        (text_of(error=3), r"error: expected str \| None, got 3"),
        (text_of(command=[7]), "command.0: expected str, got 7"),
        (text_of(command="run"), r"command: expected tuple\[str, ...\], got 'run'"),
        (with_provenance(data={"source": "x"}), "provenance.data lacks hash, test, train"),
        (
            with_provenance(data=RECORD.provenance.data | {"train": "many"}),
            "data.train: expected int, got 'many'",
        ),
        (with_provenance(device={"kind": "cpu"}), "provenance.device lacks cores, count, cpu, platform"),
        (with_provenance(versions={"jax": 9}), "provenance.versions.jax: expected str, got 9"),
        (
            with_provenance(settings={"XLA_FLAGS": []}),
            r"XLA_FLAGS: expected bool \| str \| None, got \[\]",
        ),
        (text_of(result=None), "status is finished and result is None"),
        (text_of(status="crashed"), "status is crashed and result is"),
        (text_of(result={"test_accuracy": 1}), "result lacks compile_seconds, "),
        (text_of(result={**RESULT, "test_accuracy": "94"}), "result.test_accuracy: expected float, got '94'"),
        (text_of(epochs=[{}]), "epochs.0 lacks epoch, "),
        (text_of(epochs=None), r"epochs: expected tuple\[EpochInfo, ...\], got None"),
        (text_of(epochs=[3]), "epochs.0: expected EpochInfo, got 3"),
    ],
)
def test_damaged_or_foreign_file(tmp_path, text, fault):
    path = tmp_path / "x" / "record.json"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(RecordError, match=f"record.json is not a record of a run: .*({fault})"):
        records.read(path)
    with pytest.raises(RecordError, match=r"record\.json"):
        records.find(tmp_path)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"[" * 100_000, "recursion"),
        (b'{"a":' * 100_000, "recursion"),
        (b"[" * 100 + b"]" * 100, "nested more than 50 deep"),
        (b"1" * 1_000_000, "digits"),
        (b'{"seed": NaN}', "NaN is not JSON"),
        (b"[-Infinity]", "-Infinity is not JSON"),
        (text_of().replace("0.945", "1e999").encode(), "accuracy: got inf"),
        (text_of().replace("0.945", "9" * 400).encode(), "accuracy: got 9999"),
        (text_of().replace('"seed": 3', '"seed": ' + "3" * 10**6).encode(), "digits"),
        (text_of().encode("utf-16"), "decode"),
        (b"\xff\xfe\x00", "decode"),
        (b"\0" * 1000, "Expecting value"),
        (b" " * (MAX_BYTES + 1), "more than 16,777,216 bytes"),
    ],
    ids=[f"hostile{i}" for i in range(13)],
)
def test_hostile_file(tmp_path, content, fault):
    path = tmp_path / "record.json"
    path.write_bytes(content)
    with pytest.raises(RecordError, match=fault):
        records.read(path)


def test_not_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")  # is not waited for
    for name, fault in (("pipe.json", "not a plain file"), ("missing.json", "No such file"), ("", "directory")):
        with pytest.raises(RecordError, match=fault):
            records.read(tmp_path / name)


def test_what_a_terminal_would_obey_is_spelled_out(tmp_path):
    text, path = "a\x1b[2Jb\rc\0d\ud800e\x9bf\nä", tmp_path / "record.json"
    data = RECORD.provenance.data | {"source": text}
    path.write_text(text_of(DIVERGED, error=text, provenance=RECORD.provenance.to_dict() | {"data": data}))
    record = records.read(path)
    assert record.error == record.provenance.data["source"] == "a\\x1b[2Jb\\rc\\x00d\\ud800e\\x9bf\nä"


def test_unknown_keys_are_ignored(tmp_path):
    path = tmp_path / "record.json"
    path.write_text(text_of(later=1))
    assert records.read(path).seed == 3


def test_find(tmp_path):
    assert records.find(tmp_path / "none") == {}
    paths = [records.write(dataclasses.replace(RECORD, seed=seed), tmp_path) for seed in range(2)]
    paths.append(records.write(dataclasses.replace(DIVERGED, seed=2), tmp_path))
    records.write(dataclasses.replace(RECORD, experiment="other"), tmp_path)
    assert list(records.find(tmp_path, experiment="final")) == paths
    assert [record.seed for record in records.find(tmp_path, experiment="final", status="finished").values()] == [0, 1]
    assert len(records.find(tmp_path)) == 4


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("record", [RECORD, DIVERGED], ids=lambda record: record.status)
def test_a_usable_record_or_a_record_error(tmp_path, monkeypatch, record, count):
    """Bytes changed blindly, or a few values replaced."""
    monkeypatch.chdir(tmp_path)
    path, text = tmp_path / "record.json", text_of(record)

    def edited(data):
        fields = json.loads(text)
        for _ in range(data.draw(st.integers(1, 3))):
            fields = changed(fields, data.draw)
        return json.dumps(fields).encode()

    def body(data):
        path.write_bytes(edited(data) if data.draw(st.booleans()) else data.draw(mutants(text.encode())))
        try:
            found = records.read(path)
        except RecordError as error:
            assert len(str(error)) < 1000
            return
        use(found, tmp_path / "runs")

    fuzz(count, st.data(), body)
    assert not (tmp_path / SENTINEL).exists()


def use(record, out):
    """All that commands do with a record that they have read; only documented errors may come of it."""
    line = view.seed_line("arm", record)
    assert "\x1b" not in line
    with contextlib.suppress(ValueError):
        comparison.check_comparable([comparison.Arm("a", (record,)), comparison.Arm("b", (RECORD,))])
    with contextlib.suppress(ValueError):
        check_reproducible(record)
        recipe_of(record, final)
    answer = compare_rerun(record, RECORD)
    console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), markup=False)
    console.print(line)
    show_rerun("arm", answer, console, in_any_order=True)
    json.loads(dumps(answer))
    with contextlib.suppress(RecordError):  # a name that is too long for a file
        again = records.read(records.write(record, out))
        assert repr(again) == repr(records.read(records.write(again, out)))
