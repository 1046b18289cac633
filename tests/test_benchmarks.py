"""The scripts of benchmarks/ run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SMALL = {"norms.py": "--shape 8,8,8,4 --groups 2 --activation celu --rounds 5"}


@pytest.mark.slow
@pytest.mark.parametrize("script", SMALL)
def test_scripts_run(script, tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / script, *SMALL[script].split()]
    done = subprocess.run(command, cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert " ms " in done.stdout
