"""What produced a run: collected here, compared, and read back."""

import dataclasses
from types import SimpleNamespace

import pytest

from fastcifar_jax.ops import backend
from fastcifar_jax.runs import provenance
from fastcifar_jax.runs.provenance import Provenance, data_key
from tests.helpers_records import PROVENANCE, RECORD, with_changes

INFO = SimpleNamespace(source="digits", hash="ab", classes=("0", "1"), train=100, test=20)


@pytest.fixture
def experiment(tmp_path):
    path = tmp_path / "trick.py"
    path.write_text("1")
    return path


def test_collect(experiment, monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    here = provenance.collect(INFO, experiment, "mixed", mesh="2x1")
    assert here.data == {"source": "digits", "hash": "ab", "train": 100, "test": 20} and data_key(here) == (
        "ab",
        100,
        20,
    )
    assert set(here.device) == {"kind", "platform", "count", "cpu", "cores"} and all(here.device.values())
    assert set(here.versions) == {"python", "jax", "jaxlib", "flax", "optax", "numpy", "fastcifar_jax"}
    assert (here.precision, here.mesh, here.conv) == ("mixed", "2x1", backend.conv_backend()[0])
    assert here.settings["ONEDNN_MAX_CPU_ISA"] == "AVX2" and here.settings["XLA_FLAGS"] is None
    assert here.settings["jax_default_prng_impl"] == "threefry2x32" and here.settings["jax_enable_x64"] is False
    torch = provenance.collect(INFO, experiment, "mixed", conv_backend="torch", more_versions={"torch": "9"})
    assert here.diff(torch) == {
        "conv": (here.conv, "torch"), "mesh": ("2x1", "1x1"), "versions.torch": (None, "9"),
    }  # fmt: skip


def test_source_hash_covers_the_whole_package_and_the_experiment(experiment, tmp_path, monkeypatch):
    deep = tmp_path / "package" / "ops" / "deep"
    deep.mkdir(parents=True)
    module = tmp_path / "package" / "runs" / "provenance.py"
    monkeypatch.setattr(provenance, "__file__", str(module))
    seen = [provenance.source_hash(experiment)]
    for change in (
        lambda: experiment.write_text("2"),
        lambda: (deep / "a.py").write_text("x"),
        lambda: (deep / "a.py").write_text("y"),
        lambda: (deep / "a.py").rename(deep / "b.py"),
        lambda: (deep / "b.py").rename(deep.parent / "b.py"),
    ):
        change()
        seen.append(provenance.source_hash(experiment))
        assert provenance.source_hash(experiment) == seen[-1] and len(seen[-1]) == 64
    assert len(set(seen)) == len(seen)


def test_diff():
    other = with_changes(
        RECORD, versions={"python": "3.12", "torch": "2"}, device={"cores": 4}, conv="onednn", data={"hash": "f"},
        source_hash="cd", settings={"XLA_FLAGS": "--x"},
    ).provenance  # fmt: skip
    assert PROVENANCE.diff(PROVENANCE) == {}
    assert PROVENANCE.diff(other) == {
        "source_hash": ("ab", "cd"),
        "conv": ("lax", "onednn"),
        "data.hash": ("0123456789abcdef", "f"),
        "device.cores": (2, 4),
        "versions.python": ("3.11", "3.12"),
        "versions.torch": (None, "2"),
        "settings.XLA_FLAGS": (None, "--x"),
    }
    assert other.diff(PROVENANCE) == {name: pair[::-1] for name, pair in PROVENANCE.diff(other).items()}


@pytest.mark.parametrize(
    "changes", [{"data": {"source": "x"}}, {"mesh": 1}, {"settings": {"a": []}}, {"versions": None}]
)
def test_from_dict(changes):
    fields = PROVENANCE.to_dict()
    assert Provenance.from_dict(fields) == PROVENANCE and fields == dataclasses.asdict(PROVENANCE)
    with pytest.raises(ValueError, match=f"provenance.{next(iter(changes))}"):
        Provenance.from_dict(fields | changes)
