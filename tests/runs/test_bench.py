import json

import pytest

from experiments.quickstart import quickstart
from fastcifar_jax.cli import app as cli
from fastcifar_jax.ops import backend
from fastcifar_jax.runs import bench

TASK = {"experiment": "x", "path": "no_such_file.py", "folder": None, "data": "digits", "limit_train": 128}


def result(seconds):
    return {"seconds": seconds, "images_per_second": 512 / sorted(seconds)[len(seconds) // 2], "compile_seconds": 1.0}


def test_ratio_is_taken_within_rounds_between_the_fastest():
    """A machine that slows down in the third round slows both."""
    found = bench.ratio(
        {
            "jax float32": result([9.0, 9.0, 9.0]),
            "jax mixed": result([1.0, 1.0, 4.0]),
            "torch bfloat16 eager": result([1.5, 1.2, 6.0]),
            "torch float32 eager": result([8.0, 8.0, 8.0]),
        }
    )
    assert found == {
        "jax": "jax mixed", "torch": "torch bfloat16 eager", "median": 1.5, "least": 1.2, "largest": 1.5,
    }  # fmt: skip


def test_no_ratio_without_torch():
    assert bench.ratio({"jax mixed": result([1.0])}) is None


def test_contenders():
    names = [c.name for c in bench.contenders(TASK, ("mixed",), against_torch=True)]
    assert names == [
        "jax mixed", "torch bfloat16 eager tuned", "torch bfloat16 eager", "torch bfloat16 compiled tuned",
        "torch float32 eager", "torch float32 compiled tuned",
    ]  # fmt: skip
    assert [c.name for c in bench.contenders(TASK, ("mixed", "float32"), False)] == ["jax mixed", "jax float32"]


def test_a_contender_that_fails_is_left_out_with_its_reason():
    broken = bench.Contender("broken", {**TASK, "kind": "jax", "dtype": "mixed"})
    said = []
    results, failed = bench.measure([broken], 64, 5, said.append)
    assert results == {}
    assert "there is no file no_such_file.py" in failed["broken"]
    assert said == ["broken: compiling and warming up", f"broken: left out: {failed['broken']}"]


@pytest.mark.slow
def test_bench_command_measures_and_writes_json(tmp_path, capsys, monkeypatch):
    trick = tmp_path / "tiny.py"
    small = quickstart.model.with_width(2)
    trick.write_text(
        "import dataclasses\nfrom experiments.quickstart import quickstart\n"
        f"RECIPE = dataclasses.replace(quickstart, model=quickstart.model.with_width({small.channels[0]}))\n"
    )
    out = tmp_path / "bench.json"
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", str(trick), "--data", "digits", "--limit-train", "128", "--rounds", "5", "--json", str(out)])
    assert ended.value.code == 0
    [found] = json.loads(out.read_text())
    measured = found["contenders"][f"jax {backend.default_dtype()[0]}"]
    assert found["experiment"] == "tiny" and found["ratio"] is None and found["failed"] == {}
    assert len(measured["seconds"]) == 5 and measured["peak_bytes"] > 1e7
    assert set(found["layers"]["layer1/block"]) == {"shape", *bench.PASSES}
    assert found["layers"]["layer1/block"]["shape"] == "3x3 2->4 @32"
    assert "images/s" in capsys.readouterr().out
