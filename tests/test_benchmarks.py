"""The scripts of benchmarks/ run."""

import dataclasses
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from benchmarks.compile_for_gpu import CARDS, bytes_of, conv_dtypes, floor_seconds, kernels_of_loop, row
from benchmarks.on_gpu import Step, run_step
from experiments import bag_of_tricks

final = dataclasses.replace(bag_of_tricks.final, compute_dtype="float16")
ROOT = Path(__file__).parent.parent
PROGRAM = """
%body (p: (f16[8,4], s32[])) -> (f16[8,4], s32[]) {
  %p = (f16[8,4]{1,0}, s32[]) parameter(0)
  %x = f16[8,4]{1,0} get-tuple-element(%p), index=0
  %y = (f16[8,4]{1,0}, u8[16]{0}) custom-call(%x, %x), custom_call_target="__cudnn$convForward"
  %z = f16[8,4]{1,0} get-tuple-element(%y), index=0
  %sum = f16[8,4]{1,0} all-reduce(%z), to_apply=%add
  %r = f32[8]{0} fusion(%sum), kind=kInput, calls=%fused, metadata={op_name="jit(f)/reduce_sum"}
  ROOT %t = (f16[8,4]{1,0}, s32[]) tuple(%sum, %i)
}

ENTRY %main (a: f16[8,4]) -> f16[8,4] {
  ROOT %loop = (f16[8,4]{1,0}, s32[]) while(%a), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"9"}}
}
"""


def run(*command, cwd=ROOT):
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=cwd, env=dict(os.environ), capture_output=True, text=True, timeout=1800)


@pytest.mark.slow
def test_norms_runs(tmp_path):
    small = "--shape 8,8,8,4 --groups 2 --activation celu --rounds 5".split()
    done = run(ROOT / "benchmarks" / "norms.py", *small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert " ms " in done.stdout


def test_what_is_read_of_a_compiled_program():
    """A convolution reads 64 bytes twice and writes 64 and 16, a sum over devices 64 and 64, a reduction 64 and 32."""
    kernels, known = kernels_of_loop(PROGRAM)
    assert known and [(kernel.kind, kernel.size) for kernel in kernels] == [
        ("__cudnn$convForward", 208), ("all-reduce", 128), ("Input", 96),
    ]  # fmt: skip
    assert kernels[-1].origin == "jit(f)/reduce_sum" and conv_dtypes(kernels) == "1 f16"
    assert bytes_of("(f32[2,3]{1,0}, pred[], u8[0])") == 25
    cells = row(final, CARDS["a100"], 1, PROGRAM, 2**20).split(" | ")
    assert cells[3] == "3" and cells[6:] == ["1", "1 f16", "none", "1, 0.0 MB |"]
    unknown = PROGRAM.replace("known_trip_count", "x").replace("all-reduce(%z), to_apply", "while(%z), body")
    assert row(final, CARDS["a100"], 1, unknown, 0).split(" | ")[8] == "while, trip count"


def test_the_floor_of_final():
    """970 steps of 1.17 TFLOP at 312 TFLOP/s, and nothing moved."""
    assert floor_seconds(final, CARDS["a100"], 0, 1) == pytest.approx(970 * 1.17e12 / 312e12, rel=0.01)


def test_a_step_that_hangs_or_comes_too_late_costs_no_other():
    hangs = Step("Hangs", ("-c", "import time; print('cat', flush=True); time.sleep(60)"), 3)
    assert run_step(hangs, 60).startswith("## Hangs\n\nstopped at its limit of 3 s, 3 s\n\n```text\ncat\n```")
    assert run_step(hangs, 2.0).startswith("## Hangs\n\nstopped at its limit of 2 s")
    assert run_step(hangs, -1.0) == "## Hangs\n\nleft out: the time is over\n"
    fails = Step("Fails", ("-c", "raise SystemExit('no cat')"), 60)
    assert run_step(fails, 60).startswith("## Fails\n\nstatus 1,") and "no cat" in run_step(fails, 60)


@pytest.mark.slow
def test_the_dry_run_leaves_its_answers(tmp_path):
    done = run("-m", "benchmarks.on_gpu", "--dry-run", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    summary = (tmp_path / "out" / "summary.md").read_text()
    ends = [line for line in summary.splitlines() if line.startswith(("status", "stopped"))]
    assert len(ends) == 11 and all(line.startswith("status 0,") for line in ends), summary
    assert "| `quickstart` |" in summary and "values right, jitted and not" in summary
    with tarfile.open(tmp_path / "out" / "records.tar.gz") as archive:
        assert sum(name.endswith(".json") for name in archive.getnames()) == 1
    assert json.loads((tmp_path / "out" / "bench.json").read_text())[0]["experiment"] == "quickstart"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "bench.json", "profile.tar.gz", "records.tar.gz", "summary.md",
    ]  # fmt: skip
